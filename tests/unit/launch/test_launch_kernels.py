"""What the planner says of the fused kernels, against torch's profiler of real runs in Triton's interpreter and against counts by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_kernels.pointwise import norm_gate
from hope_pt.config import load
from hope_pt.config.schema import ModelConfig, RunConfig
from hope_pt.engine.mesh import check_mesh
from hope_pt.errors import ConfigError
from hope_pt.launch import activations
from hope_pt.launch.activations import Share
from hope_pt.launch.allocations import AllocationCounter, Walk
from hope_pt.launch.gpus import GPUS
from hope_pt.launch.kernels import planned_model, scans
from hope_pt.launch.memory import boundary_bytes, share_of
from hope_pt.launch.speed import Assumptions, step_time
from hope_pt.nn.layout import Layout
from hope_pt.nn.mixer import CORES
from hope_pt.testing import tiny_run
from hope_pt.testing.layouts import with_engine
from hope_pt.testing.models import small_config

pytest.importorskip("triton", reason="triton is not installed")
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TOKENS = 48
WALKS = {Walk("_mlp_forward", 2): 6, Walk("_mlp_backward", 2): 3, Walk("_mlp_forward", 4): 4, Walk("_mlp_backward", 4): 2}
"""Of `kernels_model` with one row: three tiles in the memory of each of two heads, two in their two stacked ones, whose last chunk is not
written; forward and again in the replay, and backward."""


def kernels_model(**titans) -> ModelConfig:
    """Two heads of width 8; TOKENS tokens are three tiles, two chunks of the projections and two segments of the replay."""
    settings = {
        "chunk_mem": 16,
        "chunk_proj": 32,
        "save_every": 32,
        "static_eta": True,
        "static_alpha": True,
        "backend": "triton",
        **titans,
    }
    return small_config("fast", **settings).model_copy(update={"width": 16, "num_heads": 2})


def run_of(**titans) -> RunConfig:
    return with_engine(tiny_run(model=kernels_model(**titans), global_batch_size=1, seq_len=TOKENS), device="cuda")


def held(function) -> tuple[Any, int, int]:
    """(result, bytes more after it, the most in between), by torch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        result = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, now, peak


@pytest.mark.parametrize(
    ("titans", "share", "within"),
    [
        ({}, Share(rows=1, tokens=TOKENS), 0.001),
        ({"memory": "linear", "read": "anchor"}, Share(rows=1, tokens=32, documents=2, dtype=torch.bfloat16), 0.025),
    ],
    ids=["mlp", "linear-documents-bf16"],
)
def test_a_core_holds_what_was_planned(titans, share, within):
    """Kept, and the most inside the operators, forward and backward: but for a few bytes of the interpreter's own.

    within: of the backward pass; the backward of packing documents is torch's, which takes a block for itself on the CPU.
    """
    model = kernels_model(**titans)
    core = CORES["titans"](model, num_heads=2)
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    leaf, layout = torch.empty(1, dtype=share.dtype, requires_grad=True), activations._layout(model, share)
    if layout is not None:
        values: dict[str, Any] = {
            name: torch.zeros_like(t, device="cpu") if isinstance(t, torch.Tensor) else t for name, t in vars(layout).items()
        }
        layout = Layout(**values)
    y, kept, forward = held(
        lambda: core(leaf + torch.ones(share.rows, share.tokens, 2 * core.features_per_head, dtype=share.dtype), layout=layout)[0]
    )
    _, _, backward = held(lambda: y.backward(torch.zeros_like(y)))
    found = activations.core(model, share)
    assert found.kept == pytest.approx(kept, rel=1e-3)
    assert found.kept + found.forward == pytest.approx(forward, rel=1e-3)
    assert found.backward == pytest.approx(backward, rel=within)


def test_walks_are_the_tiles_that_a_program_takes_in_sequence():
    assert dict(activations.core(kernels_model(), Share(rows=1, tokens=TOKENS)).walks) == WALKS
    many = dict(activations.core(kernels_model(), Share(rows=6, tokens=TOKENS)).walks)
    assert many == {walk._replace(programs=6 * walk.programs): tiles for walk, tiles in WALKS.items()}, "rows add programs, not tiles"


def test_launches_are_counted_and_not_made():
    from hope_kernels.triton_support import without_launches

    y, weight, gate = torch.ones(1, 2, 3, 16), torch.ones(2, 16), torch.ones(1, 3, 2, 16)
    launches = []
    with without_launches(lambda *launch: launches.append(launch)):
        norm_gate(y, weight, gate, eps=1e-6, backend="triton")
    ((kernel, grid, arguments),) = launches
    assert kernel == "_norm_forward" and grid[0] == 2
    assert sum(isinstance(value, torch.Tensor) for value in arguments.values()) == 4 and arguments["K"] == 16
    result = norm_gate(y, weight, gate, eps=1e-6, backend="triton")
    torch.testing.assert_close(result, norm_gate(y, weight, gate, eps=1e-6, backend="chunked"), msg="launches are back")


def test_traffic_of_launches_that_share_the_tiles_of_a_tensor():
    a, b = torch.empty(256, device="meta"), torch.empty(256, device="meta")
    with AllocationCounter([a, b]) as counter:
        for _ in range(3):
            counter.launched("write", (4,), {"a": a, "b": b, "n": 2})
        assert (counter.kernels, counter.traffic) == (3, 2048), "the same kernel goes on where it was"
        counter.launched("read", (4,), {"a": a})
        counter.launched("write", (4,), {"a": a[128:]})
        assert counter.traffic == 2048 + 1024 + 512, "another kernel and another part are another pass"
        for _ in range(2):
            counter.launched("write", (4,), {"c": torch.empty(256, device="meta")})
        assert counter.traffic == 2048 + 1024 + 512 + 2 * 1024, "a new tensor at an old address"


@pytest.mark.parametrize(("multiprocessors", "seconds"), [(132, 6 + 4), (2, 6 + 2 * 4)])
def test_the_chain_of_writes_bounds_the_time(multiprocessors, seconds):
    """Two blocks whose forward writes take a second a tile: four programs on two multiprocessors take turns."""
    config = run_of()
    gpu = dataclasses.replace(GPUS["h100"], multiprocessors=multiprocessors)
    found = step_time(config, check_mesh(config, world_size=1), gpu, assumed=Assumptions(write_s=1.0, write_backward_s=0.0))
    assert found.compute == pytest.approx(2 * seconds, rel=1e-3)
    backward = step_time(config, check_mesh(config, world_size=1), gpu, assumed=Assumptions(write_s=0.0, write_backward_s=1.0))
    assert backward.compute == pytest.approx(seconds, rel=1e-3)


def test_kernels_keep_states_at_the_starts_of_segments():
    config, chunked = run_of(save_every=1024), run_of(save_every=1024, backend="chunked")
    share = share_of(config, check_mesh(config, world_size=1))
    matrices = 2 * 2 * 4 * 8 * 8  # W1 and W2 of two heads, fp32
    assert boundary_bytes(config, share) == matrices * (1 + 2)
    assert boundary_bytes(chunked, share) == matrices * (3 + 2 * 2)


def planned(**changes):
    return scans(load(CONFIGS / "hope_760m.toml", [f"{key}={value}" for key, value in changes.items()]))


def test_which_scans_are_planned(monkeypatch):
    assert planned() == planned(**{"engine.device": "cuda"}) == planned(**{"model.titans.backend": "triton"})
    assert (planned().backend, planned().note) == ("triton", "")
    assert planned_model(load(CONFIGS / "hope_760m.toml")).titans.backend == "triton"
    for changes in ({"engine.device": "cpu"}, {"model.titans.backend": "chunked"}):
        assert (planned(**changes).backend, planned(**changes).note) == ("chunked", "")
    assert planned(**{"model.titans.backend": "reference"}).backend == "reference"
    without = planned(**{"model.titans.dgd_scope": "layerwise"})
    assert without.backend == "chunked" and without.note == 'the scans run in plain torch: dgd_scope = "layerwise" has no kernel'
    assert "a convolution of width 3 has no kernel" in planned(**{"model.titans.conv_width": 3}).note
    with pytest.raises(ConfigError, match='backend = "triton" cannot run: dgd_scope'):
        planned(**{"model.titans.dgd_scope": "layerwise", "model.titans.backend": "triton"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert planned().backend == "chunked"
    note = planned().note
    assert "memory and time are those of plain torch" in note and note.endswith("triton is not installed on this machine")
