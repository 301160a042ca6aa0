"""`hope generate RUN --prompt TEXT`: text as it is made, and the memory as a file."""

import argparse

from sentencepiece import SentencePieceProcessor

from hope_pt.errors import EvalError
from hope_pt.evals.generation import Memory, load_memory, save_memory, stream
from hope_pt.train.trained import load_trained, require_tokenizer


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
    for token, memory in stream(
        trained.lm,
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
