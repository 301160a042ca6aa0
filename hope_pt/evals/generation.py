"""Text from a model, one token at a time, with a state of constant size, and the state as a file.

A stream that is saved after N tokens and continued for M gives, at temperature 0, the same tokens as one stream of N + M. With a token
clock (`hope_pt.nn.token_clock`) the state, and the file, include what the CMS levels have learnt from the stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hope_pt.config import config_hash
from hope_pt.config.schema import TokenClockConfig
from hope_pt.errors import CheckpointError, EvalError
from hope_pt.evals.scoring import evaluating
from hope_pt.files import replacing
from hope_pt.nn import HopeLM, LMState
from hope_pt.nn.token_clock import ClockedLM, ClockState

_FORMAT = "hope-memory-1"


@dataclass(frozen=True)
class Learnt:
    """What a stream with a token clock carries: the clock, and the state with the levels' weights."""

    clock: TokenClockConfig
    state: ClockState


@dataclass(frozen=True)
class Memory:
    """What a stream carries between tokens."""

    state: LMState
    """Of one row, after every token but the last."""
    last: int
    """The last token, which the model has not read yet."""
    learnt: Learnt | None = None
    """With a token clock; its state includes the other."""


def stream(
    lm: HopeLM | ClockedLM,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    temperature: float,
    seed: int,
    end: int | None,
    memory: Memory | None = None,
) -> Iterator[tuple[int, Memory]]:
    """Yields up to `num_tokens` (token id, memory after it); stops after the token `end`.

    The prompt is read in one pass after what `memory` has seen. temperature 0 takes the likeliest token. Raises EvalError if there is
    nothing to begin with, or for a negative temperature.
    """
    ids = [*([memory.last] if memory else []), *prompt]
    if not ids:
        raise EvalError("nothing to continue: give a prompt or a memory")
    if temperature < 0:
        raise EvalError(f"temperature = {temperature}: expected 0 (the likeliest token) or more")
    generator = torch.Generator().manual_seed(seed)
    state: LMState | ClockState | None = None
    if memory:
        state = memory.learnt.state if memory.learnt and isinstance(lm, ClockedLM) else memory.state
    for _ in range(num_tokens):
        with evaluating(lm) as device:
            logits_BTV, state = lm(torch.tensor([ids], device=device), state=state, return_state=True)
        token = _pick(logits_BTV[0, -1].cpu(), temperature=temperature, generator=generator)
        memory = _memory(lm, state, last=token)
        yield token, memory
        if token == end:
            return
        ids = [token]


def _memory(lm: HopeLM | ClockedLM, state: LMState | ClockState, *, last: int) -> Memory:
    if isinstance(state, LMState):
        return Memory(state=state, last=last)
    assert isinstance(lm, ClockedLM)
    return Memory(state=state.now, last=last, learnt=Learnt(lm.clock, state))


def _pick(logits_V: torch.Tensor, *, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))


def save_memory(memory: Memory, path: str | Path, *, lm: HopeLM) -> None:
    """Writes a memory as one safetensors file, whole or not at all; raises CheckpointError if the disk refuses."""
    path = Path(path)
    metadata = {"format": _FORMAT, "model": config_hash(lm.config), "last": str(memory.last)}
    if memory.learnt:
        metadata["clock"] = memory.learnt.clock.model_dump_json()
    state = memory.learnt.state if memory.learnt else memory.state
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in state.to_tensors().items()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the memory to {path}: {error}; name a file in a directory that can be written") from error


def load_memory(path: str | Path, *, lm: HopeLM) -> Memory:
    """The memory in a file that `save_memory` wrote; raises CheckpointError if it is damaged or of another model."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a memory: {error}; give a file that --save-memory wrote") from error
    if metadata.get("format") != _FORMAT or not metadata.get("last", "").isdigit():
        raise CheckpointError(f"{path} is not a memory of this version; give a file that --save-memory wrote")
    if metadata["model"] != config_hash(lm.config):
        raise CheckpointError(f"{path} is the memory of another model configuration; continue it with the run that wrote it")
    tensors = {name: tensor.to(lm.embedding.weight.device) for name, tensor in tensors.items()}
    if "clock" not in metadata:
        return Memory(state=LMState.from_tensors(tensors), last=int(metadata["last"]))
    learnt = Learnt(TokenClockConfig.model_validate_json(metadata["clock"]), ClockState.from_tensors(tensors))
    return Memory(state=learnt.state.now, last=int(metadata["last"]), learnt=learnt)
