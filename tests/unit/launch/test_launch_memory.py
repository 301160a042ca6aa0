"""The planner's bytes against the engine: parameters exactly, activations against a real block on the CPU."""

from pathlib import Path

import pytest
import torch

from hope_pt.config import load
from hope_pt.config.schema import RunConfig
from hope_pt.engine.mesh import Mesh, check_mesh
from hope_pt.launch import activations
from hope_pt.launch.activations import Passing, Share
from hope_pt.launch.allocations import AllocationCounter
from hope_pt.launch.dry_run import dry_run
from hope_pt.launch.memory import in_flight, rank_bytes
from hope_pt.launch.weights import checkpoint_bytes, held, weight_bytes
from hope_pt.nn import HopeBlock, HopeLM, count_parameters
from hope_pt.testing import tiny_model, tiny_run
from hope_pt.testing.layouts import with_engine
from hope_pt.testing.models import small_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LARGE = sorted(path.stem for path in CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("name", LARGE)
def test_parameters_are_those_of_the_model_on_the_meta_device(name):
    config = load(CONFIGS / f"{name}.toml")
    model = HopeLM(config.model, device=torch.device("meta"))
    mesh = check_mesh(config, world_size=1)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert sum(p.numel for p in held(config, mesh, stage=0)) == count_parameters(config.model)["total"] == expected


LAYOUTS = {
    "alone": (1, {}),
    "tensor": (4, {"tensor_parallel": 2}),
    "pipeline": (8, {"pipeline_parallel": 4, "first_stage_layers": 1, "last_stage_layers": 1}),
    "virtual": (4, {"pipeline_parallel": 2, "virtual_stages": 2}),
    "all": (16, {"pipeline_parallel": 2, "tensor_parallel": 2, "context_parallel": 2, "precision": "bf16"}),
}


def config_of(layout: str, *, tied: bool = True) -> tuple[RunConfig, int]:
    world_size, engine = LAYOUTS[layout]
    model = tiny_model().model_copy(update={"num_layers": 6 if layout == "pipeline" else 4, "num_heads": 4, "tie_embeddings": tied})
    return with_engine(tiny_run(model=model, global_batch_size=8, seq_len=16), **engine), world_size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_builds_the_parameters_that_the_planner_counts(layout, tied):
    config, world_size = config_of(layout, tied=tied)
    mesh, ranks = dry_run(config, world_size=world_size)
    assert [rank.stage for rank in ranks][:: len(ranks) - 1 or 1] == ([0, mesh.pipeline - 1] if mesh.pipeline > 1 else [0])
    for rank in ranks:
        planned = held(config, mesh, stage=rank.stage)
        assert rank.parameters == sum(p.numel for p in planned)
        assert rank.weight_bytes == sum(p.numel * p.width for p in planned) == weight_bytes(config, mesh, stage=rank.stage).weights
        assert mesh.coordinates(rank.rank)["pipeline"] == rank.stage


def test_optimizer_bytes():
    config, _ = config_of("alone")
    mesh = check_mesh(config, world_size=1)
    total = count_parameters(config.model)["total"]
    slow = sum(count_parameters(config.model)[f"cms.level{level}"] for level in (1, 2)) + 2 * 4 * 16  # and the norms of both levels
    found = weight_bytes(config, mesh, stage=0)
    assert (found.weights, found.gradients, found.optimizer, found.accumulated) == (4 * total, 4 * total, 8 * total, 4 * slow)
    assert checkpoint_bytes(config) == 12 * total + 4 * slow
    divided = with_engine(config, distributed_optimizer=True)
    shares = weight_bytes(divided, check_mesh(divided, world_size=4), stage=0)
    assert (shares.optimizer, shares.accumulated) == (2 * total, slow)
    bf16 = with_engine(config, precision="bf16")
    mixed = weight_bytes(bf16, mesh, stage=0)
    assert mixed.gradients == found.gradients
    assert mixed.optimizer - found.optimizer == 4 * (found.weights - mixed.weights) // 2, "one fp32 master for every bf16 weight"


def measured(config, length: int) -> tuple[int, int]:
    """What two real blocks in a row keep more than one, and their highest moment backward above that."""
    blocks = [HopeBlock(config) for _ in range(2)]
    parameters = [p for block in blocks for p in block.parameters()]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with AllocationCounter(parameters) as counter:
        x, _ = blocks[0](torch.randn(1, length, config.width).requires_grad_())
        one = counter.live
        x, _ = blocks[1](x)
        two = counter.live
        counter.restart_peak()
        x.backward(torch.zeros_like(x))
    return two - one, counter.peak - two


@pytest.mark.parametrize("preset", ["fast", "momentum", "gated-delta", "attention"])
def test_traced_blocks_keep_what_real_ones_keep(preset):
    """The planner's block stands in for linear layers and scales its core; its linear layers differ from plain torch's by little."""
    config = small_config(preset, save_every=24).model_copy(update={"width": 96, "num_heads": 4})
    length = 48 if preset == "fast" else 24
    kept, backward = measured(config, length)
    found = activations.block(config, Share(rows=1, tokens=length))
    assert found.kept == pytest.approx(kept, rel=0.03)
    assert found.kept + found.backward == pytest.approx(kept + backward, rel=0.05)


def test_kept_bytes_follow_rows_documents_and_degrees():
    model = small_config("fast").model_copy(update={"width": 96, "num_heads": 4})

    def kept(**share) -> int:
        return activations.block(model, Share(**{"rows": 2, "tokens": 32, **share})).kept

    assert kept(rows=4) == pytest.approx(2 * kept(), rel=0.01)
    assert kept(tensor=2, sequence_parallel=True) == pytest.approx(kept() / 2, rel=0.02)
    assert kept(context=2) == pytest.approx(kept() / 2, rel=0.02)
    assert kept(documents=4) > 1.1 * kept()
    assert kept() / 2 < kept(context=2, by_state=True) < 0.8 * kept()


def mesh_of(pipeline: int, *, virtual: int = 1, micro: int = 8) -> Mesh:
    return Mesh(1, 1, 1, pipeline, virtual, False, (4,) * pipeline, micro, 16)


def test_micro_batches_in_flight():
    """1F1B: a stage runs ahead by the stages after it; interleaved as in megatron's schedule."""
    assert [in_flight(mesh_of(4), stage=stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(mesh_of(4, micro=2), stage=stage) for stage in range(4)] == [2, 2, 2, 1]
    assert [in_flight(mesh_of(2, virtual=2), stage=stage) for stage in range(2)] == [5, 3]


def test_recomputation_and_pipeline_shrink_what_is_kept():
    config, _ = config_of("alone")

    def peak(world_size: int, **engine):
        changed = with_engine(config, **engine)
        return rank_bytes(changed, check_mesh(changed, world_size=world_size), stage=0)

    plain, again = peak(1), peak(1, recompute="block")
    assert again.activations < plain.activations / 5 and again.total < plain.total and again.states == 0
    assert 0 < plain.states < plain.activations
    assert plain.total == plain.weights.total + plain.activations + plain.working + plain.buffers
    assert peak(2, pipeline_parallel=2).weights.total < plain.weights.total


def test_passing_scales_bytes_and_not_kernels():
    assert Passing(10, 4, 6, kernels=3, traffic=8).times(2.5) == Passing(25, 10, 15, kernels=3, traffic=20)
