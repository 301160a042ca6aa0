"""Learning rate as a pure function of the step (SPEC 4): linear warm-up, then cosine decay or stable-then-linear decay ("wsd").

Steps count from 0: `learning_rate(0)` is the rate of the first optimizer step. With W warm-up steps, step s < W has at most (s + 1) / W
of the peak, so that the first step moves. The last step of the run has exactly the final rate, unless the run ends within the warm-up.
"""

import math

from hope_pt.config.optim import OptimConfig


def learning_rate(step: int, *, optim: OptimConfig, num_steps: int) -> float:
    """Rate of optimizer step `step` (from 0) in a run of `num_steps`. Steps after the end keep the final rate."""
    last = num_steps - 1
    if optim.schedule == "cosine":
        share = cosine_share(step, start=optim.warmup_steps, end=last)
    else:
        share = linear_share(step, start=last - decay_length(optim, num_steps=num_steps), end=last)
    rate = optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * share)
    if step < optim.warmup_steps:
        # The smaller of both where a short run's decay begins within the warm-up.
        warm = optim.lr * (step + 1) / optim.warmup_steps
        return warm if optim.warmup_steps >= num_steps else min(warm, rate)
    return rate


def cosine_share(step: int, *, start: int, end: int) -> float:
    """1 up to `start`, 0 from `end`, half a cosine between."""
    return 0.5 * (1.0 + math.cos(math.pi * (1.0 - linear_share(step, start=start, end=end))))


def linear_share(step: int, *, start: int, end: int) -> float:
    """1 up to `start`, 0 from `end`, a straight line between."""
    if step >= end:
        return 0.0
    return 1.0 if step <= start else (end - step) / (end - start)


def decay_length(optim: OptimConfig, *, num_steps: int) -> int:
    """Steps of the final decay of "wsd"; a tenth of the run where optim.decay_steps = 0."""
    return optim.decay_steps or max(1, num_steps // 10)
