"""What deep rules send and keep in real runs, against the planner's formulas; how layer-wise owners are chosen."""

from collections import Counter

import pytest
import torch

from hope_pt.config import load
from hope_pt.config.optim import DeepMomentumConfig, M3Config, OptimConfig
from hope_pt.config.schema import RunConfig
from hope_pt.engine import Launch
from hope_pt.engine.layerwise import BUCKET_BYTES, buckets, owners
from hope_pt.engine.mesh import check_mesh
from hope_pt.launch.communication import sent
from hope_pt.launch.gpus import GPUS
from hope_pt.launch.speed import ASSUMED, optimizer_s, step_time
from hope_pt.launch.weights import checkpoint_bytes, held, owned, weight_bytes
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
    config = tiny_run(model=model, global_batch_size=4, seq_len=16)
    # Measurements of the levels are not part of every step.
    unmeasured = config.eval.model_copy(update={"levels_every": 0})
    return with_engine(config.model_copy(update={"optim": optim, "eval": unmeasured}), **layout)


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


@pytest.mark.parametrize("sharded", [False, True])
def test_m3_takes_little_of_a_step(sharded):
    """170M, 0.5M tokens a batch, 8 GPUs, by the planner's count; the broadcast of the weights included, as if nothing hid it."""
    ours = ["optim.name=m3", "optim.memory=m3", "engine.overlap_param_gather=false", f"engine.distributed_optimizer={str(sharded).lower()}"]
    config, gpu = load("configs/hope_170m.toml", ours), GPUS["h100"]
    mesh = check_mesh(config, world_size=8)
    assert config.train.global_batch_size * config.data.seq_len == 2**19
    own = optimizer_s(config, mesh, gpu) + sent(config, mesh, stage=0).parameters / (gpu.nvlink * ASSUMED.links)
    share = own / step_time(config, mesh, gpu).total
    assert 0.001 < share < (0.01 if sharded else 0.03)


def test_owners_are_balanced_in_every_class_of_periods():
    """At 170M over 8 ranks: the 36 equal matrices of a level make 4 or 5 for a rank."""
    config = load("configs/hope_170m.toml", ["optim.name=m3", "engine.overlap_param_gather=false"])
    ranks = owned(config, check_mesh(config, world_size=8), stage=0)
    assert sorted(p.name for own in ranks for p in own) == sorted(p.name for p in held(config, check_mesh(config, world_size=8), stage=0))
    for period in config.model.cms.periods:
        loads = [sum(p.cost for p in own if p.period == period) for own in ranks]
        assert max(loads) <= 1.12 * sum(loads) / len(loads), period


def test_owners_are_the_same_for_any_order_of_the_names():
    costs = {f"p{i}": float(i % 5) for i in range(20)}
    periods = {name: 1 + int(name[1:]) % 2 for name in costs}
    backwards = dict(reversed(costs.items()))
    assert owners(costs, periods=periods, ranks=3) == owners(backwards, periods=periods, ranks=3)


def test_a_bucket_has_one_owner_clock_and_dtype_and_is_bounded():
    large = torch.empty(BUCKET_BYTES // 8, dtype=torch.float32, device="meta")
    parameters = {"a": large, "b": large, "c": large, "d": large.bfloat16(), "e": large, "f": torch.cat([large] * 3)}
    owner_of = {"a": 0, "b": 0, "c": 0, "d": 0, "e": 1, "f": 1}
    found = buckets(parameters, owner_of=owner_of, periods=dict.fromkeys(parameters, 1) | {"c": 2})
    assert [bucket.names for bucket in found] == [("a", "b"), ("c",), ("d",), ("e",), ("f",)]
    assert [(bucket.owner, bucket.period) for bucket in found] == [(0, 1), (0, 2), (0, 1), (1, 1), (1, 1)]


def test_a_checkpoint_holds_the_state_of_every_rule():
    """Bytes of one process's checkpoint within the interval of the slow level, against the planner's."""
    config = config_of("deep_momentum-tp2")
    config = with_engine(config, tensor_parallel=1)
    with running(config, launch=Launch()) as engine:
        for step in range(3):
            engine.step(part_at(engine, step))
        tensors, _ = engine.state()
    assert sum(value.nbytes for value in tensors.values()) == checkpoint_bytes(config)
