"""`hope report`: one self-contained HTML page of a run and of what it is compared with; no network, no server, no scripts.

In: metrics.jsonl and config.toml of a run, other runs or stored curves, and samples of text. Out: RUN/report.html. A section whose
values were not measured is left out and said to be.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from hope_pt.config import diff, to_toml
from hope_pt.errors import HopeError
from hope_pt.files import replace_text
from hope_pt.report import plots
from hope_pt.report.curves import Curve
from hope_pt.report.memory import memory, row, updates
from hope_pt.report.samples import Sample
from hope_pt.report.tables import comparison, headline

MEASURED = (
    ("loss", "Training loss: nats per token over the global batch of the step, before its update."),
    ("eval/loss", "Held-out loss: mean nats per token over the same held-out sequences every time, memory fresh at the start of each."),
    ("eval/bits_per_byte", "Bits per byte: held-out loss / ln 2 / UTF-8 bytes per token, so tokenizers can be compared."),
    ("eval/trigram_bits_per_byte", "Baselines: unigram and interpolated Kneser-Ney trigram of the training tokens, on the same sequences."),
    ("eval/passkey_accuracy", "Passkey: a key stated once in held-out text must be likelier than nine distractors at the end."),
    ("eval/recall_accuracy", "Associative recall: share of queried keys whose value is the first choice."),
    ("memory/layer0/eta_mean", "Memory diagnostics: on two fixed held-out sequences, per layer."),
    ("optim/matrix/update_norm", "Updates: what the optimizer did to each CMS level and block, and to the other classes of parameters."),
)
CSS = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d2129; background: #fff;
  max-width: 1020px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .1rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #e3e6eb; }
.sub { color: #667085; margin: 0 0 1.4rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .7rem; }
.tile { border: 1px solid #e3e6eb; border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: #667085; font-size: .82rem; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; }
.row > div { flex: 1 1 440px; }
svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #edf0f4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: #667085; font-weight: 600; }
pre { background: #f6f7f9; border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }
blockquote { margin: 0 0 .8rem; padding: .6rem 1rem; border-left: 3px solid #0b6e6e; background: #f6f7f9; white-space: pre-wrap; }
blockquote em { color: #667085; }
ul { padding-left: 1.2rem; }
li { margin: .15rem 0; }
summary { cursor: pointer; color: #0b6e6e; }
@media print { body { max-width: none; margin: 0; } h2 { break-after: avoid; } }
"""


def write_report(run: Path, *, curves: Sequence[Curve], samples: Sequence[Sample] = (), out: Path | None = None) -> Path:
    """Writes the page of run directory `run`, whose curve is the first of `curves`; raises HopeError if it cannot be written."""
    code = run / "code.txt"
    version = code.read_text(encoding="utf-8", errors="replace") if code.exists() else ""
    path = out or run / "report.html"
    try:
        replace_text(path, text=page(curves, samples=samples, code=version))
    except OSError as error:
        raise HopeError(f"cannot write {path}: {error.strerror}; name another file with --out") from error
    return path


def page(curves: Sequence[Curve], *, samples: Sequence[Sample] = (), code: str = "") -> str:
    """The whole page as text; the first curve is the run, the others are compared with it."""
    run = curves[0]
    loss = plots.lines(curves, key="loss", title="Training loss", unit="nats / token", smooth=True, wide=True)
    commit = code.splitlines()[1] if code.count("\n") else "unknown"
    sections = [
        _section("Loss", loss + _heldout(curves)),
        _section("Loss by position in the document", plots.by_context(curves, title="Held-out loss by context")),
        _section("Tasks", _tasks(curves)),
        _section("Comparison", comparison(curves) if len(curves) > 1 else ""),
        _section("Memory", memory(run)),
        _section("Updates by level and block", updates(run)),
        _section("Optimisation and speed", _running(curves)),
        _section("Samples", _samples(samples)),
        _section("What was measured", _measured(run)),
        _section("Configuration", _configuration(curves, commit=commit)),
    ]
    title = escape(run.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body>\n'
        f'<h1>{title}</h1><p class="sub">{_subtitle(run)}</p>\n{headline(run)}\n' + "\n".join(sections) + "\n</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def _subtitle(run: Curve) -> str:
    if run.config is None:
        return "stored curve"
    model, periods = run.config.model, ", ".join(map(str, run.config.model.cms.periods))
    return escape(
        f"{model.num_layers} blocks of width {model.width}, {model.num_heads} heads, {model.mixer} mixer, CMS periods {periods}; "
        f"{run.config.train.global_batch_size} sequences of {run.config.data.seq_len} tokens a step"
    )


def _heldout(curves: Sequence[Curve]) -> str:
    key, unit = ("eval/bits_per_byte", "bits / byte") if curves[0].series("eval/bits_per_byte")[0] else ("eval/loss", "nats / token")
    if not curves[0].series(key)[0]:
        return ""
    measure = key.removeprefix("eval/")
    baselines = {name: curves[0].last(f"eval/{name}_{measure}") for name in ("unigram", "trigram")}
    known = {name: value for name, value in baselines.items() if value is not None}
    return plots.against_baselines(curves, key=key, baselines=known, title="Held-out text against baselines", unit=unit)


def _tasks(curves: Sequence[Curve]) -> str:
    passkey = plots.lines(curves, key="eval/passkey_accuracy", title="Passkey accuracy (chance 0.1)", unit="share right")
    margin = plots.lines(curves, key="eval/passkey_margin", title="Passkey margin over the distractors", unit="nats")
    chance = curves[0].last("eval/recall_chance")
    title = "Associative recall" + (f" (chance {chance:.3g})" if chance is not None else "")
    return row(passkey, margin, plots.lines(curves, key="eval/recall_accuracy", title=title, unit="share right"))


def _running(curves: Sequence[Curve]) -> str:
    return row(
        plots.lines(curves, key="tokens_per_s", title="Throughput", unit="tokens / s", smooth=True),
        plots.lines(curves, key="grad_norm", title="Gradient norm before clipping", unit="norm", log=True, smooth=True),
        plots.lines(curves[:1], key="lr", title="Learning rate", unit="rate"),
    )


def _samples(samples: Sequence[Sample]) -> str:
    return "".join(f"<blockquote><em>{escape(sample.prompt)}</em>{escape(sample.text)}</blockquote>" for sample in samples)


def _measured(run: Curve) -> str:
    keys = set(run.keys(""))
    items = [f"<li>{escape(text)}</li>" for key, text in MEASURED if key in keys]
    missing = [f"<code>{escape(key)}</code>" for key, _ in MEASURED if key not in keys]
    note = f'<p class="sub">Not measured in this run: {", ".join(missing)}.</p>' if missing else ""
    return f"<ul>{''.join(items)}</ul>{note}"


def _configuration(curves: Sequence[Curve], *, commit: str) -> str:
    run = curves[0]
    if run.config is None:
        return ""
    parts = [f"<p>Code: <code>{escape(commit)}</code></p>"]
    for other in curves[1:]:
        if other.config is not None:
            lines = [line for line in diff(run.config, other.config) if not line.startswith(("name:", "out:"))]
            parts.append(f"<p>{escape(other.name)} differs in</p><pre>{escape(chr(10).join(lines) or 'nothing')}</pre>")
    return "".join(parts) + f"<details><summary>config.toml</summary><pre>{escape(to_toml(run.config))}</pre></details>"
