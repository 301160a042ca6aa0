"""`hope memory audit RUN|STATE`: what a run, or a memory file, has changed, what drove it, and what each change is worth."""

import argparse
import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from hope_pt import data
from hope_pt.cli.tables import table
from hope_pt.errors import DataError, EvalError
from hope_pt.evals import audit, audit_state, audit_tokens
from hope_pt.evals.generation import load_memory
from hope_pt.nn.names import level_of
from hope_pt.train.trained import Trained, load_trained, require_tokenizer

SEQUENCES = 32
TOP = 3
NOTE = (
    "Sequences are ranked by the length of their own part of the gradient that the update summed, of the level's parameters, before "
    "clipping, at the weights of the step given. That says who pushed hard, not what was learned: parts can cancel each other, and "
    "clipping, moments and weight decay make the update from their sum."
)


def run(arguments: argparse.Namespace) -> None:
    """Prints the audit of a run directory or of a memory file."""
    for name, value in (("--sequences", arguments.sequences), ("--top", arguments.top)):
        if value is not None and value < 1:
            raise EvalError(f"{name} {value}: expected 1 or more")
    path = Path(arguments.path)
    if not path.exists():
        raise EvalError(f"{path} does not exist; name a run directory, or a file that `hope generate --save-memory` wrote")
    if path.is_dir():
        _forbid(arguments, "text", "against", why="a run is audited on its own held-out data; drop it")
        _audit_run(path, arguments)
    else:
        _forbid(arguments, "since", "sequences", "top", why="a memory file has no steps and no training data; drop it")
        _audit_state(path, arguments)


def _forbid(arguments: argparse.Namespace, *names: str, why: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise EvalError(f"--{name} {getattr(arguments, name)}: {why}")


def _audit_run(path: Path, arguments: argparse.Namespace) -> None:
    trained = load_trained(path, step=arguments.step)
    config, since = trained.config, arguments.since
    if config.token_clock.meta_train:
        raise EvalError(
            f"{path} was trained with token_clock.meta_train = true: its updates are of losses with the token clock on, which the audit "
            "does not read with; audit a run without it"
        )
    sequences, top = arguments.sequences or SEQUENCES, arguments.top or TOP
    with (
        closing(data.open_source(config.data, split="train", vocab_size=config.model.vocab_size)) as train,
        closing(data.open_source(config.data, split="heldout", vocab_size=config.model.vocab_size)) as heldout,
    ):
        if train.fingerprint != trained.fingerprint:
            raise DataError(f"{config.data.path} has fingerprint {train.fingerprint}, the run was trained on {trained.fingerprint}")
        start, checked = audit.start_weights(path, trained, since=since)
        changes = audit.changes(trained.lm, start)
        loss, undone = audit.undone(trained, start, source=heldout, sequences=sequences)
        # Another run's weights may be gone, and with --since the user has said that they do not matter.
        first = start if since is None else None if config.train.start_from else audit.start_weights(path, trained)[0]
        driven = audit_tokens.driven(
            path, trained, first, since=since or 0, source=train, decode=_decoder(trained), sequences=sequences, top=top
        )
    origin = "the start" if since is None else f"step {since}"
    if arguments.json:
        found = {"run": str(path), "step": trained.step, "since": since or 0, "start_checked": checked, "heldout_loss": loss, "note": NOTE}
        found |= {"changes": [asdict(one) for one in changes], "undone": [asdict(one) for one in undone]}
        print(json.dumps(found | {"updates": [asdict(one) for one in driven]}, indent=1))
        return
    console = Console()
    for part in (_changes(changes, title=f"{config.name}, step {trained.step}: change since {origin}"), _undone(loss, undone, origin)):
        console.print(part, "")
    _print_driven(driven, console)
    print("change: |W - W_start| / |W_start|")
    if not checked:
        print(f'not checked: whether "{config.train.start_from}" still has the weights that this run began with (eval.levels_every = 0)')


def _decoder(trained: Trained) -> audit_tokens.Decode:
    """Text of tokens; for a generated task their numbers."""
    if trained.tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(trained.tokenizer)).decode


def _changes(changes: list[audit.Change], *, title: str):
    rows = [(one.row, f"{one.change:.2%}", _short(one.matrix), f"{one.matrix_change:.2%}") for one in changes]
    return table(title, "part", "change", "changed most", "by", rows=rows)


def _short(name: str) -> str:
    """A parameter's name without the level that its row says, and without "blocks."."""
    place = level_of(name)
    return name.partition(f".levels.{place[0]}.")[2] if place else name.removeprefix("blocks.")


def _undone(loss: float, undone: list[audit.Undone], origin: str):
    rows = [("nothing", f"{loss:.4f}", ""), *((one.what, f"{one.loss:.4f}", f"{one.difference:+.4f}") for one in undone)]
    return table(f"held-out loss, nats per token, with a level back at {origin}", "undone", "loss", "difference", rows=rows)


def _print_driven(driven: list[audit_tokens.Driven], console: Console) -> None:
    if not driven:
        print("no measured updates of these steps in metrics.jsonl (eval.levels_every = 0, or too few steps): what drove them is not known")
        return
    for one in driven:
        update = one.update
        title = f"level {update.level}, update at step {update.step}: {update.ratio:.3%} of the weights"
        rows = [
            (f"{driver.step}", f"{driver.sample}", f"{driver.loss:.3f}", f"{driver.share:.1%}", f"{driver.token!r} {driver.token_loss:.2f}")
            for driver in one.drivers
        ]
        console.print(table(title, "step", "sample", "loss", "share of gradients", "least expected token, nats", rows=rows))
        for driver in one.drivers:
            console.print(f"  {driver.sample}: {driver.text!r}", markup=False, highlight=False, soft_wrap=True)
        print(f"  ({one.examined} of {one.candidates} sequences, at the weights of step {one.weights_step})\n")
    print(NOTE)


def _audit_state(path: Path, arguments: argparse.Namespace) -> None:
    if arguments.against is None:
        raise EvalError(f"{path} is a memory file: name the run whose model wrote it with --against RUN")
    trained = load_trained(arguments.against, step=arguments.step)
    memory = load_memory(path, lm=trained.lm)
    ids: list[int] = []
    if arguments.text is not None:
        from sentencepiece import SentencePieceProcessor

        ids = SentencePieceProcessor(model_file=str(require_tokenizer(trained))).encode(arguments.text)
        if not ids:
            raise EvalError("--text is empty; give text that follows what the memory has read, or leave it out")
    found = audit_state.audit_state(trained.lm, memory, text=ids)
    if arguments.json:
        print(json.dumps({"state": str(path), "run": arguments.against, "step": trained.step} | asdict(found), indent=1))
        return
    console = Console()
    worth = ("change", "loss undone", "difference")
    if found.changes:
        memories = [(f"{one.layer}", one.memory, f"{one.norm_ratio:.3f}", *_worth(one)) for one in found.changes]
        title = f"{path}: memories after {found.tokens:,} tokens"
        console.print(table(title, "layer", "memory", "|W| / |W_start|", *worth, rows=memories), "")
    if found.levels:
        levels = [(f"{one.level}", "all" if one.block is None else f"{one.block}", *_worth(one)) for one in found.levels]
        console.print(table("what the token clock has changed", "level", "block", *worth, rows=levels), "")
    print("change: |W - W_start| / |W_start|, from the learned start or the trained weights")
    if ids:
        print(f"loss of {found.text_tokens} tokens of text: {found.loss:.4f} nats, {found.fresh:.4f} by the model without this memory")


def _worth(one: audit_state.MemoryChange | audit_state.LevelChange) -> tuple[str, str, str]:
    loss, difference = ("" if value is None else form.format(value) for value, form in ((one.loss, "{:.4f}"), (one.difference, "{:+.4f}")))
    return f"{one.change:.2%}", loss, difference
