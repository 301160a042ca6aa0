"""Rewrites tests/golden/configs: the resolved form of every file in configs/ (`make golden`).

A test compares them, so that an inherited default cannot change unseen. Run it after a deliberate change and read the difference.
"""

from pathlib import Path

from hope_pt.config import load, to_toml

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Write one golden file per configuration and remove those whose configuration is gone."""
    golden = ROOT / "tests" / "golden" / "configs"
    golden.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "configs").glob("*.toml"))
    for source in sources:
        (golden / source.name).write_text(to_toml(load(source)))
    for stale in {path.name for path in golden.glob("*.toml")} - {source.name for source in sources}:
        (golden / stale).unlink()
    print(f"{len(sources)} golden configurations in {golden.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
