"""Floating-point operations of the network, part by part, as the code computes them: forward, backward and replay.

A multiply-add counts as two. Matrix products are counted as they are run, so the C x C products of a chunk count in full although half of
each is zero; triangular solves are counted apart (n^2 operations a column), because torch's own counter does not know them. Elementwise
work is not counted. The memory's inner loop is SPEC 2.1 in the order of operations of `hope_kernels`: `fused` for the default rule,
`chunk` for every other.
Legend: C tokens of a chunk, K head width, F memory hidden width, N chunks of a sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

from hope_kernels import fused
from hope_kernels.replay import segments
from hope_kernels.rule import MemoryRule
from hope_pt.config.schema import ModelConfig
from hope_pt.nn.titans import adaptive_streams, memory_rule


class Work(NamedTuple):
    """FLOPs of matrix products in the forward and the backward pass, and of triangular solves in both."""

    forward: float = 0.0
    backward: float = 0.0
    solves: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.forward + other.forward, self.backward + other.backward, self.solves + other.solves)

    def times(self, factor: float) -> "Work":
        """The same work `factor` times."""
        return Work(self.forward * factor, self.backward * factor, self.solves * factor)


def linear(features_in: int, features_out: int) -> Work:
    """One token through one matrix: 2 in out forward, and twice that for both gradients."""
    forward = 2.0 * features_in * features_out
    return Work(forward, 2 * forward)


def attention(config: ModelConfig, *, seq_len: int) -> Work:
    """Scores and mixed values of all heads for one token, causal: half of the T x T matrix. Backward runs the scores again: 5 products."""
    forward = 2 * 2.0 * config.width * (seq_len + 1) / 2
    return Work(forward, 2.5 * forward)


def memory(config: ModelConfig, *, seq_len: int) -> tuple[Work, float]:
    """(work, replayed) of both scans for one token and all heads of a layer; replayed: FLOPs of the forward pass that run again.

    Of a sequence longer than titans.save_every the forward pass runs again in backward: all of it, or in the fused form what leads to the
    gradients. titans.memory_off, a control, counts as if the memory were on.
    """
    titans = config.titans
    shape = _Shape(memory_rule(titans), config.head_width, config.memory_hidden, titans.read == "causal")
    stack = adaptive_streams(titans)
    save_every = seq_len if shape.is_fused else titans.save_every
    proj, mem = (_chunks(seq_len, chunk, save_every) for chunk in (titans.chunk_proj, titans.chunk_mem))
    total = Work()
    for chunk in proj:
        total += _projection_chunk(shape, stack, chunk, retention=titans.retention)
    for chunk in mem:
        total += _memory_chunk(shape, chunk)
    again = 0.0
    if seq_len > titans.save_every:
        again = total.forward
        if shape.is_fused:
            again -= sum(2 * chunk.size * shape.matrix * len(stack) for chunk in proj if chunk.left)  # new weights
            again -= sum((2 if chunk.left else 0 if shape.causal else 2 * shape.targets + 1) * chunk.size * shape.matrix for chunk in mem)
            again -= 0.0 if shape.causal else sum(2 * chunk.size * shape.matrix for chunk in mem)
            again -= 0.0 if stack else sum(4.0 * chunk.size * shape.width for chunk in proj)
    return total.times(config.num_heads / seq_len), again * config.num_heads / seq_len


class _Chunk(NamedTuple):
    """Length of a chunk, whether it is the first of its sequence, and how many follow it."""

    size: int
    first: bool
    left: int


def _chunks(seq_len: int, chunk: int, save_every: int) -> list[_Chunk]:
    sizes = [size for first, end, size in segments(seq_len, chunk, save_every) for _ in range((end - first) // size)]
    return [_Chunk(size, index == 0, len(sizes) - 1 - index) for index, size in enumerate(sizes)]


@dataclass(frozen=True)
class _Shape:
    rule: MemoryRule
    width: int
    hidden: int
    causal: bool

    @property
    def is_fused(self) -> bool:
        return fused.supports(self.rule)

    @property
    def targets(self) -> int:
        """Passes through the memory for one token's error: the key, and the value where the target is self-generated."""
        return 2 if self.rule.self_target else 1

    @property
    def matrix(self) -> float:
        """One token through one weight matrix of the memory."""
        return 2.0 * self.width * (self.hidden if self.rule.memory == "mlp" else self.width)


def _projection_chunk(shape: _Shape, stack: tuple[str, ...], chunk: _Chunk, *, retention: bool) -> Work:
    """One chunk of the projection scan and one head. The last chunk's writes are read by nobody: the fused form leaves them out.

    Without retention the memory of alpha runs but nothing depends on it: autograd leaves its readout's backward pass out, the fused form
    does not.
    """
    size = chunk.size
    vector = 2.0 * size * shape.width
    if stack and shape.is_fused:
        total = Work(2 * vector, 2 * vector)
        one = _fused_chunk(shape, size, causal=False, writes=True) if chunk.left else Work()
        for name in stack:
            read = _readout(shape, size) if name in ("eta", "alpha") else _both(2 * size * shape.matrix)
            total += read + Work(0.0, size * shape.matrix) + one  # the product with W2 runs again
        return total + _fused_written(shape, size) if chunk.left else total
    readouts = _both(vector) + (_both if retention else Work)(vector)
    if not stack:
        return readouts
    one = _surprise(shape, size) + _general_writes(shape, chunk, reads=False)
    if shape.rule.memory == "mlp":
        one += _terms(shape, size, shape.hidden, layer=1, reads=False)
    write = one.times(len(stack)) + _terms(shape, size, shape.width, layer=0, reads=False) + _decay(shape, size, reads=False)
    read = _both(len(stack) * shape.rule.num_layers * size * shape.matrix)
    return readouts + read + (write if chunk.left else write._replace(backward=0.0))


def _memory_chunk(shape: _Shape, chunk: _Chunk) -> Work:
    """One chunk of the memory scan and one head. Error signals of the last chunk matter only where the chunk is read inside."""
    size, causal = chunk.size, shape.causal
    if shape.is_fused:
        work = _fused_chunk(shape, size, causal=causal, writes=chunk.left > 0)
        read = Work() if causal else Work(2 * size * shape.matrix, 5 * size * shape.matrix)
        return read + _fused_terms(shape, size, causal=causal) + (work if causal or chunk.left else Work())
    total = _decay(shape, size, reads=causal) + _terms(shape, size, shape.width, layer=0, reads=causal)
    signals = _surprise(shape, size)
    if shape.rule.memory == "mlp":
        signals += _terms(shape, size, shape.hidden, layer=1, reads=causal, written=chunk.left > 0)
    writes = _general_writes(shape, chunk, reads=causal)
    if not chunk.left:
        writes, signals = writes._replace(backward=0.0), signals if causal else signals._replace(backward=0.0)
    read = _general_read(shape, chunk) if causal else _both(shape.rule.num_layers * size * shape.matrix)
    return total + signals + writes + read


def _both(forward: float) -> Work:
    """Products whose two factors both need a gradient."""
    return Work(forward, 2 * forward)


def _readout(shape: _Shape, size: int) -> Work:
    """What a memory adds to the readout of eta or alpha in the fused projection scan: W1 meets the readout vector and no token."""
    vector = 2.0 * shape.width * shape.hidden
    forward = size * shape.matrix + 2.0 * size * shape.hidden + vector
    return Work(forward, 2 * size * shape.matrix + 2.0 * size * shape.hidden + 2 * vector)


def _fused_terms(shape: _Shape, size: int, *, causal: bool) -> Work:
    """`fused.terms_forward` and `terms_backward` of one chunk. Backward computes Gram matrix and scores again."""
    erase = shape.rule.erases(0)
    gram, square = 2.0 * size * size * shape.width, 2.0 * size**3
    if not causal:
        return Work(2 * gram, 5 * gram, float(size**3)) if erase else Work()
    scores = Work(gram, 3 * gram)
    return scores + Work(2 * gram + square, 5 * gram + 2 * square, float(size**3)) if erase else scores


def _fused_written(shape: _Shape, size: int) -> Work:
    """`fused.written_forward` and `written_backward` of one chunk."""
    count, width = fused.tiles(size, shape.width), shape.width
    if count == 1 or not shape.rule.erases(0):
        return _fused_terms(shape, size, causal=False)
    tile, step = 2.0 * (size // count) * width**2, 2.0 * width**3
    across = Work(2 * count * tile + (count - 1) * step, (4 * count - 2) * tile + (2 * count - 3) * step)
    return across + _fused_terms(shape, size // count, causal=False).times(count)


def _fused_chunk(shape: _Shape, size: int, *, causal: bool, writes: bool) -> Work:
    """`fused.chunk_forward` and `chunk_backward`: error signals, causal read and both new weights of one memory."""
    matrix, targets = size * shape.matrix, shape.targets
    forward = matrix * (2 * targets + 1 + 2 * writes)
    backward = matrix * (4 * targets + 2 + 4 * writes)
    if causal:
        inside = 2.0 * size * size * (2 * shape.hidden + shape.width)
        forward += 2 * matrix + inside
        backward += 4 * matrix + 2 * inside
    return Work(forward, backward)


def _decay(shape: _Shape, size: int, *, reads: bool) -> Work:
    """`chunk.decay`: only momentum needs products. Without an erase nothing depends on the weights before a token."""
    if not shape.rule.momentum:
        return Work()
    square = 2.0 * size**3
    return _both(square * reads + 2 * 2.0 * size**2) + (_both if shape.rule.erases(0) else Work)(square)


def _terms(shape: _Shape, size: int, width: int, *, layer: int, reads: bool, written: bool = True) -> Work:
    """`chunk.chunk_terms` of inputs of `width` features; a solve's backward pass is one solve and one product.

    written: the chunk's end state is used; else the products for it have no backward pass.
    """
    momentum = shape.rule.momentum
    gram, square = 2.0 * size * size * width, 2.0 * size**3
    total = _both(gram if reads else 0.0)
    if not shape.rule.erases(layer):
        return total
    total += _both(gram) + (_both if written else Work)(gram * momentum)
    if not reads:
        return total + Work(0.0, gram, gram)
    inverse = _both(square * (2 if momentum else 1)) + Work(0.0, square, square)
    return total + inverse + (_both if written else Work)(gram)


def _surprise(shape: _Shape, size: int) -> Work:
    """`memory.surprise` of one memory."""
    matrix = size * shape.matrix
    if shape.rule.memory == "linear":
        return _both(shape.targets * matrix)
    return _both(matrix * (2 * shape.targets + 1 + shape.rule.erases(1)))


def _general_writes(shape: _Shape, chunk: _Chunk, *, reads: bool) -> Work:
    """`chunk.end_weight` of all matrices of one memory; reads: momentum is also read inside a chunk, else the last one is not needed."""
    matrix = chunk.size * shape.matrix
    total = Work()
    for layer in range(shape.rule.num_layers):
        total += _both(matrix)
        if shape.rule.momentum:
            total += (_both if reads or chunk.left > 1 else Work)(matrix)
            if shape.rule.erases(layer):
                total += _both(matrix) + _from_momentum(matrix, first=chunk.first)
    return total


def _general_read(shape: _Shape, chunk: _Chunk) -> Work:
    """The causal read: `chunk.read_inside` and W_0 q for every matrix."""
    rule, matrix = shape.rule, chunk.size * shape.matrix
    total = Work()
    for layer, outputs in enumerate((shape.hidden, shape.width) if rule.memory == "mlp" else (shape.width,)):
        inside = 2.0 * chunk.size**2 * outputs
        total += _both(matrix + inside)
        if rule.momentum:
            total += _from_momentum(matrix, first=chunk.first)
            if rule.erases(layer):
                total += _from_momentum(matrix, first=chunk.first) + _both(inside)
    return total


def _from_momentum(forward: float, *, first: bool) -> Work:
    """A product with the momentum at the chunk's start, which is zero and needs no gradient in the first chunk."""
    return Work(forward, forward if first else 2 * forward)
