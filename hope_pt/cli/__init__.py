"""The `hope` command: `train`, `eval`, `generate`, `stack`, `memory`, `report`, `summary`, `estimate`, `doctor`, `config`, `launch`.

This file parses arguments and turns exceptions into exit codes; each command is a module that is imported when it runs, so that
`hope --help` answers at once. Exit codes: 0 done; 2 the user's error, one line on standard error; 1 our bug, with its traceback;
93 do not restart (the run diverged); 130 interrupted from the keyboard.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from hope_pt.cli.launch_arguments import add_launch
from hope_pt.errors import HopeError

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command with `argv` (the process's arguments by default) and returns its exit code."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[StderrHandler()], force=True)
    logging.getLogger("hope_pt").setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    command = importlib.import_module(f"hope_pt.cli.{arguments.module}")
    try:
        command.run(arguments)
        sys.stdout.flush()
    except HopeError as error:
        print("hope: " + " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        hint = "; the same command continues from the newest checkpoint" if arguments.module == "train" else ""
        print(f"hope: interrupted{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`hope report ... | head`); what python would still flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` counts wherever it stands, also after options, where argparse takes no more positional arguments."""
    commands = parser()
    arguments, rest = commands.parse_known_args(argv)
    later = [text for text in rest if "=" in text and not text.startswith("-")] if "overrides" in arguments else []
    if len(later) < len(rest):
        commands.error(f"unrecognized arguments: {' '.join(text for text in rest if text not in later)}")
    if later:
        arguments.overrides = [*arguments.overrides, *later]
    return arguments


class StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at that moment, so that lines appear above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(prefix + record.getMessage(), file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments; nothing is imported but argparse."""
    root = argparse.ArgumentParser(prog="hope", description="Pretrain, evaluate and run HOPE models.", allow_abbrev=False)
    root.add_argument("-v", "--verbose", action="store_true", help="also log what is usually not worth a line")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a configuration, or continue the run of that name")
    train.add_argument("config", metavar="CONFIG", help="TOML file")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="for example optim.lr=3e-4 name=try2")
    train.add_argument("--dry-run", action="store_true", help="build the layout and the model without data, GPUs or a run directory")
    train.add_argument("--world-size", type=int, metavar="N", help="processes of the job that --dry-run builds (default 1)")
    train.set_defaults(module="train")

    evaluate = commands.add_parser("eval", help="evaluate the newest checkpoint of a run on its held-out data")
    evaluate.add_argument("run", metavar="RUN", help="run directory")
    evaluate.add_argument("--step", type=int, help="this checkpoint instead of the newest")
    evaluate.add_argument("--data", metavar="DIR", help="another directory of shards, same tokenizer")
    evaluate.add_argument("--sequences", type=int, help="held-out sequences (default: eval.sequences)")
    evaluate.add_argument("--documents", type=int, default=0, metavar="N", help="also read N long held-out documents, each in one go")
    evaluate.add_argument("--document-tokens", type=int, default=4096, metavar="T", help="of them at most T tokens (default 4096)")
    _add_clock(evaluate)
    evaluate.set_defaults(module="evaluate")

    _add_generate(commands)
    _add_stack(commands)
    _add_memory(commands)
    _add_costs(commands)
    add_launch(commands)

    report = commands.add_parser("report", help="write RUN/report.html: curves, evaluations, memory heat maps, samples")
    report.add_argument("run", metavar="RUN", help="run directory")
    report.add_argument("others", metavar="RUN_OR_FILE", nargs="*", help="runs, or stored curves (CSV, JSON), to compare with")
    report.add_argument("--compare", metavar="RUN_OR_FILE", nargs="+", default=[], help="the same")
    report.add_argument("--store-curve", metavar="FILE", help="write the run's curve to a small .json instead of a page")
    report.add_argument("--out", metavar="FILE", help="write the page here instead")
    report.set_defaults(module="report")

    doctor = commands.add_parser("doctor", help="what this machine can run, and what to install for the rest; exit code 2: cannot train")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument("--out", metavar="DIR", default="runs", help="where runs will be written (default: runs)")
    doctor.set_defaults(module="doctor")

    config = commands.add_parser("config", help="show or compare resolved configurations")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("show", help="the resolved configuration as TOML")
    show.add_argument("config", metavar="CONFIG")
    show.add_argument("overrides", metavar="key=value", nargs="*")
    show.set_defaults(module="config", action="show")
    diff = actions.add_parser("diff", help="one line for each key that differs")
    diff.add_argument("config", metavar="A")
    diff.add_argument("other", metavar="B")
    diff.set_defaults(module="config", action="diff")
    return root


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = commands.add_parser("generate", help="continue a prompt, token by token, with a state of constant size")
    generate.add_argument("run", metavar="RUN", help="run directory")
    generate.add_argument("--prompt", default="", help="text to continue")
    generate.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens to generate (default 100)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    generate.add_argument("--step", type=int, help="this checkpoint instead of the newest")
    generate.add_argument("--save-memory", metavar="FILE", help="write the model's memory after the last token here")
    generate.add_argument("--load-memory", metavar="FILE", help="begin with the memory that --save-memory wrote")
    generate.add_argument("--freeze", action="store_true", help="keep the levels as a token clock left them in the loaded memory")
    _add_clock(generate)
    generate.set_defaults(module="generate")


def _add_clock(command: argparse.ArgumentParser) -> None:
    command.add_argument("--token-clock", metavar="C,C,...", help="tokens after which every CMS level learns from what it read, 0: never")
    command.add_argument("--token-lr", metavar="LR,LR,...", help="learning rates of the levels for it; one number is for all")


def _add_stack(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stack = commands.add_parser("stack", help="make a trained model with one CMS level the start of one with several")
    stack.add_argument("run", metavar="RUN", help="run directory")
    stack.add_argument("--how", required=True, choices=("assign_by_depth", "clone_k"), help="periods of the blocks, or more levels")
    stack.add_argument("--periods", required=True, metavar="N,N,...", help="optimizer steps between updates, fastest first: 1,4,16")
    stack.add_argument("--out", required=True, metavar="DIR", help="new directory: start.toml for `hope train`, and the weights")
    stack.add_argument("--step", type=int, help="this checkpoint instead of the newest")
    stack.set_defaults(module="stack")


def _add_memory(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    memory = commands.add_parser("memory", help="what a run or a memory file has changed, and what it is worth")
    actions = memory.add_subparsers(required=True, metavar="ACTION")
    audit = actions.add_parser("audit", help="changes, the loss with each undone, and for a run the tokens that drove them")
    audit.add_argument("path", metavar="RUN|STATE", help="run directory, or a file that `hope generate --save-memory` wrote")
    audit.add_argument("--step", type=int, help="this checkpoint instead of the newest")
    audit.add_argument("--since", type=int, metavar="STEP", help="RUN: changes since this checkpoint, not since the start")
    audit.add_argument("--sequences", type=int, metavar="N", help="RUN: held-out sequences, and training sequences per update (default 32)")
    audit.add_argument("--top", type=int, metavar="K", help="RUN: updates per level, and sequences per update (default 3)")
    audit.add_argument("--against", metavar="RUN", help="STATE: the run whose model wrote the file")
    audit.add_argument("--text", help="STATE: text whose loss is measured after what the memory has read")
    audit.add_argument("--json", action="store_true", help="for programs")
    audit.set_defaults(module="memory")


def _add_costs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = commands.add_parser("summary", help="parameters by class, FLOPs per token, state bytes, optimizer groups")
    summary.add_argument("config", metavar="CONFIG", help="TOML file")
    summary.add_argument("overrides", metavar="key=value", nargs="*")
    summary.set_defaults(module="summary")

    estimate = commands.add_parser("estimate", help="parameters, bytes per rank, communication and step time of a layout; layouts that fit")
    estimate.add_argument("config", metavar="CONFIG", help="TOML file")
    estimate.add_argument("overrides", metavar="key=value", nargs="*", help="for example engine.tensor_parallel=2")
    estimate.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of the job (default 8)")
    estimate.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100 (default), h200 or b200")
    estimate.add_argument("--documents", type=int, default=1, metavar="N", help="documents in a row of data (default 1)")
    estimate.add_argument("--search", action="store_true", help="also list the layouts that fit, fastest first")
    estimate.add_argument("--json", action="store_true", help="for programs")
    estimate.set_defaults(module="estimate")
