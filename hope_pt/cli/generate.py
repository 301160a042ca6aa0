"""`hope generate RUN --prompt TEXT`: text as it is made, and the memory as a file."""

import argparse
from dataclasses import replace

from sentencepiece import SentencePieceProcessor

from hope_pt.cli.clock import token_clock
from hope_pt.errors import EvalError
from hope_pt.evals.generation import Memory, load_memory, save_memory, stream
from hope_pt.nn import HopeLM
from hope_pt.nn.token_clock import ClockedLM
from hope_pt.train.trained import Trained, load_trained, require_tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Prints the prompt and its continuation."""
    if arguments.tokens < 1:
        raise EvalError(f"--tokens {arguments.tokens}: expected 1 or more")
    trained = load_trained(arguments.run, step=arguments.step)
    tokenizer = SentencePieceProcessor(model_file=str(require_tokenizer(trained)))
    start = load_memory(arguments.load_memory, lm=trained.lm) if arguments.load_memory else None
    ids: list[int] = tokenizer.encode(arguments.prompt)
    if not ids and start is None:
        # Documents end with the end token, so what follows it is the beginning of one.
        ids = [tokenizer.eos_id()]
    print(arguments.prompt, end="", flush=True)
    made: list[int] = []
    end: Memory | None = None
    shown = ""
    lm, start = _with_clock(arguments, trained, start)
    for token, memory in stream(
        lm,
        ids,
        num_tokens=arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        end=tokenizer.eos_id(),
        memory=start,
    ):
        made.append(token)
        end = memory
        # A character can take several tokens; until it is complete it decodes to the replacement character.
        text = tokenizer.decode(made).rstrip("\ufffd")
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()
    if arguments.save_memory and end is not None:
        save_memory(end, arguments.save_memory, lm=trained.lm)


def _with_clock(arguments: argparse.Namespace, trained: Trained, start: Memory | None) -> tuple[HopeLM | ClockedLM, Memory | None]:
    """The model, with the token clock of the arguments, of the memory file or of the run, and the memory as it begins."""
    clock = token_clock(arguments, trained.config)
    learnt = start.learnt if start else None
    if learnt:
        named = arguments.token_clock is not None or arguments.token_lr is not None
        if named and (clock.active, clock.periods) != (learnt.clock.active, learnt.clock.periods):
            periods = ",".join(str(period) for period in learnt.clock.periods)
            raise EvalError(
                f"--load-memory {arguments.load_memory} was written with --token-clock {periods} and other levels; give the same"
            )
        clock = clock if named else learnt.clock
    if arguments.freeze:
        if start is None or learnt is None:
            raise EvalError(
                "--freeze needs --load-memory with a file that was written with --token-clock: nothing else has weights to keep"
            )
    if start and learnt and learnt.state.levels.frozen != arguments.freeze:
        # The file remembers how it was made; this call says for itself.
        start = replace(start, learnt=replace(learnt, state=learnt.state.freeze(arguments.freeze)))
    return (ClockedLM(trained.lm, clock) if clock.active else trained.lm), start
