"""Goals, failures and the table of the GPU benchmark, from its results alone."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
SDPA_GOALS = {2048: 2.0, 8192: 0.6, 32768: 0.18, 131072: 0.05}
"""Time of the linear memory's scan over attention's, forward and backward, by tokens of a sequence."""


def told(rows: Iterable[Row]) -> list[Row]:
    """The rows, each printed as it comes."""
    kept = []
    for row in rows:
        print(line(row), flush=True)
        kept.append(row)
    return kept


def line(row: Row) -> str:
    """One row of the table."""
    sizes = [f"{row[name]} {name}" for name in ("batch", "count", "tokens", "heads", "width", "size", "vocabulary") if name in row]
    parts = [f"{row['op'] + ' ' + row.get('kind', ''):<32} {', '.join(sizes):<52}"]
    if "failed" in row:
        return " ".join([*parts, f"FAILED {row['failed']}"])
    for name in ("forward", "both"):
        if name in row:
            spread = f"({row[name]['p10']:.3f}..{row[name]['p90']:.3f}, {row[name]['repetitions']} times)"
            parts.append(f"{name} {row[name]['ms']:.3f} ms {spread}")
    parts += [f"{row[name]} {unit}" for name, unit in (("tflops", "TFLOP/s"), ("tb_s", "TB/s"), ("peak_mib", "MiB")) if name in row]
    if "kernels" in row:
        parts.append(f"{row['total_ms']} ms: " + "; ".join(f"{name[:60]} {ms}" for name, ms in row["kernels"].items()))
    return " ".join(parts)


def goals(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> value, at_most or at_least, met. A goal whose figures are missing has value and met None."""
    found: dict[str, dict[str, Any]] = {}
    for shape, rows in _by_shape(results.get("scans", [])).items():
        _scan_goals(found, shape, rows, results.get("ceilings", {}))
    _kind_goals(found, results)
    tools = results.get("sanitizer", {})
    if tools:
        clean = all(said == "clean" for said in tools.values())
        could = not any(said.startswith("cannot run") for said in tools.values())
        found["compute-sanitizer clean"] = {"value": tools, "met": clean if could else None}
    return found


def _by_shape(rows: list[Row]) -> dict[tuple[int, ...], dict[str, Row]]:
    shapes: dict[tuple[int, ...], dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault((row["batch"], row["tokens"], row["heads"], row["width"]), {})[row["op"]] = row
    return shapes


def _ms(rows: dict[str, Row], *names: str) -> float | None:
    """Forward and backward of the fastest of some operations."""
    spent = [rows[name]["both"]["ms"] for name in names if "both" in rows.get(name, {})]
    return min(spent) if spent else None


def _goal(found: dict[str, dict[str, Any]], name: str, over: float | None, under: float | None, **limit: float) -> None:
    """Record over / under against at_most or at_least."""
    ((kind, bound),) = limit.items()
    value = None if over is None or not under else over / under
    met = None if value is None else value <= bound if kind == "at_most" else value >= bound
    found[name] = {"value": None if value is None else round(value, 3), kind: bound, "met": met}


def _scan_goals(found: dict[str, dict[str, Any]], shape: tuple[int, ...], rows: dict[str, Row], ceilings: dict[str, float]) -> None:
    batch, tokens, heads, width = shape
    at = f"{batch}x{tokens}, {heads} heads of {width}"
    linear, attention = _ms(rows, "linear"), _ms(rows, "sdpa flash", "sdpa cudnn", "sdpa")
    _goal(found, f"linear memory over fla, {at}", linear, _ms(rows, "fla"), at_most=1.0)
    _goal(found, f"MLP memory over fla, {at}", _ms(rows, "mlp"), _ms(rows, "fla"), at_most=3.0)
    if tokens in SDPA_GOALS:
        for name in ("linear", "mlp", "self-modifying"):
            _goal(found, f"{name} over attention, {at}", _ms(rows, name), attention, at_most=SDPA_GOALS[tokens])
    if "forward" in rows.get("linear", {}) and ceilings:
        floor = rows["linear"]["floor_bytes"] / ceilings["copy_tb_s"] / 1e9
        _goal(found, f"linear memory's forward over its bytes' time, {at}", rows["linear"]["forward"]["ms"], floor, at_most=6.0)
    for name in rows:
        if f"{name} chunked" in rows:
            _goal(found, f"{name}: chunked over triton, {at}", _ms(rows, f"{name} chunked"), _ms(rows, name), at_least=1.0)
    if "self-modifying linear" in rows:
        _goal(found, f"five linear memories over one, {at}", _ms(rows, "self-modifying linear"), linear, at_most=4.0)


def _kind_goals(found: dict[str, dict[str, Any]], results: dict[str, Any]) -> None:
    """Of the operations that are measured by kind: triton beside others."""
    matrices: dict[str, dict[str, float]] = {}
    for row in results.get("newton_schulz", []):
        if "forward" in row:
            matrices.setdefault(f"{row['count']} of {row['size']}", {})[row["kind"]] = row["forward"]["ms"]
    for sizes, spent in matrices.items():
        for kind, bound in (("compiled", 1.2), ("chunked", 1.0)):
            if sizes.endswith(" of 2048") or kind == "chunked":
                _goal(found, f"Newton-Schulz: {kind} over triton, {sizes}", spent.get(kind), spent.get("triton"), at_least=bound)
    head = {row["kind"]: row for row in results.get("head", []) if "both" in row}
    if {"triton", "unfused"} <= head.keys():
        _goal(found, "head and loss: memory over unfused", head["triton"]["peak_mib"], head["unfused"]["peak_mib"], at_most=0.35)
        _goal(found, "head and loss: time over unfused", head["triton"]["both"]["ms"], head["unfused"]["both"]["ms"], at_most=1.1)
    rows = {(row["op"], row["kind"]): row["both"]["ms"] for row in results.get("pointwise", []) if "both" in row}
    for name in sorted({op for op, _ in rows}):
        _goal(found, f"{name}: chunked over triton", rows.get((name, "chunked")), rows.get((name, "triton")), at_least=1.0)


def failures(results: dict[str, Any]) -> list[str]:
    """One line for each check that is wrong and each measurement that did not run."""
    lines = [f"{row['check']}: {row['wrong']}" for row in results.get("checks", []) if row["wrong"]]
    lines += [f"compiling {each}" for each in results.get("precompile", [])]
    for section in ("scans", "newton_schulz", "head", "pointwise", "profile"):
        lines += [line(row) for row in results.get(section, []) if "failed" in row]
    return lines


def table(results: dict[str, Any]) -> str:
    """All rows, then checks, ceilings and goals."""
    lines = ["REHEARSAL ON A CPU: the times below mean nothing"] if results["rehearsal"] else []
    lines += [f"{results['environment']['gpu']}, {results['environment']['versions']}, commit {results['environment']['commit']}"]
    for section in ("scans", "newton_schulz", "head", "pointwise", "profile"):
        lines += [line(row) for row in results.get(section, [])]
    if "checks" in results:
        checks = results["checks"]
        lines.append(f"checks: {sum(not row['wrong'] for row in checks)} of {len(checks)} right (seed {results['seed']})")
    if "ceilings" in results:
        lines.append("ceilings: " + ", ".join(f"{name} {value}" for name, value in results["ceilings"].items()))
    words = {True: "met", False: "MISSED", None: "not measured"}
    for name, goal in results["goals"].items():
        limit = next((f"{word} {goal[key]}" for key, word in (("at_most", "<="), ("at_least", ">=")) if key in goal), "")
        lines.append(f"goal {words[goal['met']]:<12} {name}: {goal['value']} {limit}")
    return "\n".join(lines)
