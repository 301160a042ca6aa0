"""What deep rules send and keep in real runs, against the planner's formulas; how layer-wise owners are chosen."""

from collections import Counter

import pytest
import torch

from hope_pt.config import load
from hope_pt.config.schema import CMSConfig, DeepMomentumConfig, M3Config, OptimConfig, RunConfig
from hope_pt.engine import Launch
from hope_pt.engine.layerwise import BUCKET_BYTES, buckets, owners
from hope_pt.engine.mesh import check_mesh
from hope_pt.launch.communication import sent
from hope_pt.launch.weights import FP32, checkpoint_bytes, held, owned, weight_bytes
from hope_pt.testing import run_distributed, tiny_model, tiny_run
from hope_pt.testing.communication import CommunicationCounter
from hope_pt.testing.layouts import part_at, running, with_engine

RANKS = 4
# A level of period 2 whose slow momentum has period 2 returns to its first phase after four steps.
STEPS = 4
SHARDED = {"distributed_optimizer": True}
CASES = {
    "m3-tp2-dp2": ("m3", {"tensor_parallel": 2}),
    "m3-dp4-sharded": ("m3", SHARDED),
    "m3-tp2-dp2-sharded": ("m3", {"tensor_parallel": 2, **SHARDED}),
    "m3-tp2-cp2-sharded-bf16": ("m3", {"tensor_parallel": 2, "context_parallel": 2, "precision": "bf16", **SHARDED}),
    "muon-tp4": ("muon", {"tensor_parallel": 4}),
    "delta_momentum-tp2": ("delta_momentum", {"tensor_parallel": 2}),
    "deep_momentum-tp2": ("deep_momentum", {"tensor_parallel": 2}),
    "dgd-tp2-recomputed": ("dgd", {"tensor_parallel": 2, "recompute": "block"}),
    "dgd-tp2-dp2-sharded": ("dgd", {"tensor_parallel": 2, "sequence_parallel": False, **SHARDED}),
}
WITH_MEMORIES = "m3-tp2-dp2-sharded"


def config_of(case: str) -> RunConfig:
    rule, layout = CASES[case]
    mixer = "titans" if case == WITH_MEMORIES else "attention"
    model = tiny_model(mixer=mixer, periods=(1, 2)).model_copy(update={"num_heads": 4, "width": 32})
    optim = OptimConfig(name=rule, memory="muon", m3=M3Config(slow_every=2), deep_momentum=DeepMomentumConfig(hidden=4))
    config = tiny_run(model=model, global_batch_size=4, seq_len=16).model_copy(update={"optim": optim})
    return with_engine(config, **layout)


def measure(launch: Launch, cases: list[str]) -> dict[str, tuple[Counter, int]]:
    """Of every case: bytes that this rank sends in a step, on the mean over STEPS, and bytes of its optimizer: masters, state, sums."""
    found = {}
    for case in cases:
        with running(config_of(case), launch=launch, key=case) as engine:
            with CommunicationCounter(engine.plan) as counter:
                for step in range(STEPS - 1):
                    engine.step(part_at(engine, step))
                kept = engine.optimizer.entries()
                engine.step(part_at(engine, STEPS - 1))
            state = sum(value.nbytes for entry in kept.values() for value in entry.values() if value.dim())
            masters = sum(piece.main.nbytes for name, piece in engine.optimizer.pieces.items() if piece.main is not engine.parameters[name])
            found[case] = Counter({kind: size / STEPS for kind, size in counter.sent.items()}), state + masters
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, list[tuple[Counter, int]]]:
    ranks = run_distributed(measure, world_size=RANKS, timeout_s=150, args=(list(CASES),))
    return {case: [rank[case] for rank in ranks] for case in CASES}


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", CASES)
def test_the_planner_knows_what_is_sent(measured, case):
    """The mean over ranks and steps; norms, losses and counts are a few numbers."""
    config = config_of(case)
    planned = vars(sent(config, check_mesh(config, world_size=RANKS), stage=0))
    for kind in ("tensor", "context", "gradients", "parameters"):
        found = sum(counter[kind] for counter, _ in measured[case]) / RANKS
        assert found == pytest.approx(planned[kind], rel=1e-3, abs=64), kind


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", CASES)
def test_the_planner_knows_what_is_kept(measured, case):
    """After three steps the level of period 2 is within an interval, and every state exists."""
    config = config_of(case)
    found = weight_bytes(config, check_mesh(config, world_size=RANKS), stage=0)
    assert max(size for _, size in measured[case]) == found.optimizer + found.accumulated
