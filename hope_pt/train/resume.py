"""May this configuration continue that run? Everything that decides a loss must be unchanged; the rest may differ.

Free to change: where the run and the data lie, how often things are saved and measured (but updates that were not measured from the first
step on are never: their start is not known), trackers, reader processes, time limits, which of the steps to come count as accidents, the
parallel layout, the provider of linear layers, the micro-batch and the kernel backend (results then agree up to rounding, and the log says
so). `train.steps` may change if the learning rate of every step already taken is the same under both lengths: "wsd" before its decay, never
"cosine" after its warm-up.
"""

import logging

from hope_pt.checkpoint import Checkpoint
from hope_pt.config import diff, loads
from hope_pt.config.schema import RunConfig
from hope_pt.engine import collectives
from hope_pt.errors import CheckpointError, ConfigError, DataError
from hope_pt.optim.schedule import learning_rate
from hope_pt.train.state import FORMAT

LOG = logging.getLogger(__name__)

FREE = (
    "name",
    "out",
    "data.path",
    "data.backend",
    "data.remote",
    "data.num_workers",
    "engine.overlap_p2p",
    "engine.overlap_grad_reduce",
    "engine.overlap_param_gather",
    "engine.timeout_s",
    "checkpoint.",
    "eval.",
    "track.",
    "train.skip.",
    "watchdog.",
)
# Sketches of the start, and counts of updates, are kept from the first step on or not at all.
MEASURED = ("eval.levels_every",)
FREE_UP_TO_ROUNDING = (
    "engine.tensor_parallel",
    "engine.sequence_parallel",
    "engine.pipeline_parallel",
    "engine.virtual_stages",
    "engine.first_stage_layers",
    "engine.last_stage_layers",
    "engine.context_parallel",
    "engine.context_mode",
    "engine.distributed_optimizer",
    "engine.recompute",
    "engine.provider",
    "engine.micro_batch_size",
    "engine.device",
    "engine.threads",
    "model.titans.backend",
    "model.titans.save_every",
    "model.head_backend",
)


def check(config: RunConfig, *, checkpoint: Checkpoint, fingerprint: str, data_parallel: int) -> None:
    """Raises ConfigError naming every key that must not differ, DataError if the samples are not those the run has read."""
    meta = checkpoint.meta
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint.path}: state format {meta.get('format')}, this version reads format {FORMAT}")
    stored = loads(meta["config"], source=str(checkpoint.path / "meta.json"))
    check_config(config, stored=stored, step=checkpoint.step, data_parallel=(meta["data_parallel"], data_parallel))
    if meta["fingerprint"] != fingerprint:
        raise DataError(
            f"data.path = {config.data.path!r} has fingerprint {fingerprint}, but run {config.name!r} has read data with fingerprint "
            f"{meta['fingerprint']} up to step {checkpoint.step}; give it that data, or give this run another name"
        )


def check_config(config: RunConfig, *, stored: RunConfig, step: int, data_parallel: tuple[int, int] = (1, 1)) -> None:
    """Raises ConfigError if `stored`, the configuration of the run's first `step` steps, decides other losses than `config`.

    data_parallel: degree of those steps, and of the ones to come; which no configuration says.
    """
    begins = bool(step and config.eval.levels_every and not stored.eval.levels_every)
    changes = [line for line in diff(stored, config) if not _is_under(line, FREE) or (begins and _is_under(line, MEASURED))]
    rounding = [line for line in changes if _is_under(line, FREE_UP_TO_ROUNDING)]
    refused = [line for line in changes if line not in rounding]
    if any(_is_under(line, ("train.steps",)) for line in refused) and _same_past(config, stored=stored, step=step):
        refused = [line for line in refused if not _is_under(line, ("train.steps",))]
    if refused:
        raise ConfigError(
            f"run {config.name!r} was trained for {step} steps with another configuration ({'; '.join(refused)}); "
            "take the change back, or give this run another name"
        )
    before, now = data_parallel
    if before != now:
        rounding.append(f"data-parallel ranks: {before} -> {now}")
    if rounding and collectives.rank() == 0:
        LOG.warning("continuing with %s: losses agree with the uninterrupted run up to rounding, not bit for bit", "; ".join(rounding))


def compare_code(checkpoint: Checkpoint, *, now: str) -> None:
    """Says so if the code that made the checkpoint is not the code of version `now`; a run may go on with mended code."""
    before = checkpoint.meta.get("code_version", now)
    if before != now:
        LOG.warning("continuing with code %s; %s was made with code %s", now, checkpoint.path, before)


def _same_past(config: RunConfig, *, stored: RunConfig, step: int) -> bool:
    """Whether both lengths give the steps already taken the same learning rates."""
    return all(
        learning_rate(past, optim=config.optim, num_steps=config.train.steps)
        == learning_rate(past, optim=config.optim, num_steps=stored.train.steps)
        for past in range(step)
    )


def _is_under(line: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a line "key: a -> b" of `config.diff` is about one of the keys, or of the sections that end in a point."""
    key = line.partition(": ")[0]
    return any(key == prefix or (prefix.endswith(".") and key.startswith(prefix)) for prefix in prefixes)
