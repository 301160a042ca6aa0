"""The numbers at the top of a report, and the table of compared curves."""

from collections.abc import Callable, Sequence
from functools import partial
from html import escape

from hope_pt.report.curves import Curve

LAST_LOSSES = 50
"""The final training loss is the mean of this many last lines."""


def headline(run: Curve) -> str:
    """Tiles with the figures that matter most, those that were measured."""
    tiles = [(label, text) for label, text in _figures(run) if text]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{text}</b><span>{escape(label)}</span></div>' for label, text in tiles)
        + "</div>"
    )


def _figures(run: Curve) -> list[tuple[str, str]]:
    tokens, seconds = run.last("tokens"), run.last("wall_s")
    steps = run.series("loss")[0]
    trigram = run.last("eval/trigram_bits_per_byte")
    against = f" (trigram {trigram:.3f})" if trigram is not None else ""
    chance = run.last("eval/recall_chance")
    return [
        ("steps", f"{steps[-1]:,}" if steps else ""),
        ("tokens", f"{tokens:,.0f}" if tokens is not None else ""),
        (f"training loss, mean of the last {LAST_LOSSES}", _number(final_loss(run))),
        ("held-out loss, nats / token", _number(run.last("eval/loss"))),
        (f"held-out bits / byte{against}", _number(run.last("eval/bits_per_byte"))),
        ("passkey accuracy (chance 0.1)", _number(run.last("eval/passkey_accuracy"))),
        (f"recall accuracy (chance {chance:.3g})" if chance is not None else "", _number(run.last("eval/recall_accuracy"))),
        ("tokens / s, mean", f"{tokens / seconds:,.0f}" if tokens and seconds else ""),
        ("minutes in steps", f"{seconds / 60:.1f}" if seconds else ""),
    ]


def comparison(curves: Sequence[Curve]) -> str:
    """One row a curve: final losses, tasks, speed; a column that nobody has is left out."""
    contexts = curves[0].keys("eval/loss_at_context/")
    picked = [contexts[0], contexts[len(contexts) // 2], contexts[-1]] if len(contexts) > 2 else contexts
    columns: dict[str, Callable[[Curve], float | None]] = {
        "steps": lambda curve: curve.last("step"),
        "training loss": final_loss,
        "held-out loss": lambda curve: curve.last("eval/loss"),
        "bits / byte": lambda curve: curve.last("eval/bits_per_byte"),
        **{f"at {key.rpartition('/')[2]}": partial(Curve.last, key=key) for key in picked},
        "passkey": lambda curve: curve.last("eval/passkey_accuracy"),
        "recall": lambda curve: curve.last("eval/recall_accuracy"),
        "tokens / s": _speed,
    }
    kept = {name: [value(curve) for curve in curves] for name, value in columns.items()}
    kept = {name: values for name, values in kept.items() if any(value is not None for value in values)}
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *kept))
    rows = [
        f"<tr><td>{escape(curve.name)}</td>" + "".join(f"<td>{_number(values[row]) or '–'}</td>" for values in kept.values()) + "</tr>"
        for row, curve in enumerate(curves)
    ]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def final_loss(curve: Curve) -> float | None:
    """Mean of the last training losses."""
    values = curve.series("loss")[1][-LAST_LOSSES:]
    return sum(values) / len(values) if values else None


def _speed(curve: Curve) -> float | None:
    tokens, seconds = curve.last("tokens"), curve.last("wall_s")
    return tokens / seconds if tokens and seconds else None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"
