"""The protocol between the loop and its hooks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One finished step: loss in nats per token over the global batch, cumulative tokens, seconds."""

    step: int
    """Steps done, counting this one."""
    loss: float
    lr: float
    grad_norm: float
    """Global gradient norm before clipping."""
    skipped: bool
    """Loss or gradient were not finite, or a spike, and the engine dropped the update; elsewhere both are finite."""
    tokens: int
    """Tokens read since the run began, over all ranks."""
    tokens_per_s: float
    """Of this step, over all ranks, waiting for data included."""
    data_s: float
    """Seconds this step waited for its batch."""
    wall_s: float
    """Seconds in steps since the run began, over all sessions."""
    skips: int = 0
    """Steps dropped since the run began."""


class Hook:
    """Does nothing; a hook overrides the moments it cares about. All ranks call the same hooks in the same order.

    phase: what a rank that calls the hook is doing, for the watchdog (`engine.phases`); empty: what it did before.
    """

    phase = ""

    def start(self, step: int) -> None:
        """Before the first step of this session; `step` steps are done."""

    def after_step(self, record: StepRecord) -> None:
        """After each step."""

    def close(self) -> None:
        """At the end of the session, however it ended."""


def due(step: int, *, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step` steps."""
    return every > 0 and step % every == 0
