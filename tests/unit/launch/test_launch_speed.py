"""The step-time model and the search: what must hold whatever the assumptions are."""

import dataclasses

import pytest

from hope_pt.errors import ConfigError, ParallelError
from hope_pt.launch.estimate import estimate, stages_to_show
from hope_pt.launch.gpus import GPUS, budget, gpu_of
from hope_pt.launch.search import search
from hope_pt.launch.speed import bubble_fraction, step_time
from hope_pt.testing import tiny_model, tiny_run
from hope_pt.testing.layouts import with_engine

H100 = GPUS["h100"]


def config_of(**engine):
    model = tiny_model().model_copy(update={"num_layers": 4, "num_heads": 4})
    return with_engine(tiny_run(model=model, global_batch_size=8, seq_len=16), **engine)


def time_of(world_size: int, **engine):
    config = config_of(**engine)
    return step_time(config, estimate(config, world_size=world_size, gpu=H100).mesh, H100)


def test_the_parts_of_a_step_add_up():
    for world_size, engine in ((1, {}), (4, {"pipeline_parallel": 4}), (8, {"tensor_parallel": 2, "pipeline_parallel": 2})):
        time = time_of(world_size, **engine)
        assert time.total == pytest.approx(time.compute + time.communication + time.bubble + time.exposed + time.optimizer)
        assert time.tokens_per_s == pytest.approx(8 * 16 / time.total)


def test_the_bubble_is_megatrons():
    found = estimate(config_of(pipeline_parallel=4), world_size=4, gpu=H100)
    assert found.bubble == bubble_fraction(found.mesh) == pytest.approx(3 / 11)
    assert time_of(4, pipeline_parallel=4).bubble == pytest.approx(3 / 8 * time_of(4, pipeline_parallel=4).compute, rel=0.2)
    assert bubble_fraction(estimate(config_of(pipeline_parallel=2, virtual_stages=2), world_size=2, gpu=H100).mesh) == pytest.approx(1 / 17)


def test_what_costs_time_costs_time_here():
    assert time_of(1, recompute="block").compute > time_of(1).compute
    assert time_of(1, micro_batch_size=4).compute < time_of(1).compute, "fewer passes of the same kernels"
    assert time_of(4, context_parallel=4, context_mode="state").compute > time_of(4, context_parallel=4).compute
    assert time_of(16, tensor_parallel=2).exposed > time_of(8, tensor_parallel=2).exposed, "a second node"
    overlapped = {"overlap_grad_reduce": True, "distributed_optimizer": True, "overlap_param_gather": True}
    assert time_of(16, tensor_parallel=2, **overlapped).exposed < time_of(16, tensor_parallel=2).exposed


def test_documents_cost_the_scans_time_in_the_estimate_and_the_search_alike():
    def seconds(documents: int) -> tuple[float, float]:
        config = config_of(micro_batch_size=8)
        best = search(config, world_size=1, gpu=H100, documents=documents)[0]
        found = estimate(config.model_copy(update={"engine": best.engine}), world_size=1, gpu=H100, documents=documents)
        return found.time.total, best.time.total

    one, four = seconds(1), seconds(4)
    assert one[0] == one[1] < four[0] == four[1]


def test_the_search_gives_layouts_that_fit_fastest_first():
    found = search(config_of(), world_size=8, gpu=H100)
    assert [one.time.total for one in found] == sorted(one.time.total for one in found)
    assert all(one.mesh.world_size == 8 and one.fullest.total <= budget(H100) for one in found)
    settings = {tuple(one.engine.model_dump().items()) for one in found}
    assert len(settings) == len(found) > 20
    assert {one.mesh.tensor for one in found} == {1, 2, 4} and {one.mesh.pipeline for one in found} == {1, 2, 4}
    # A GPU on which nothing fits.
    small = dataclasses.replace(H100, memory=3e9 + 1000)
    assert search(config_of(), world_size=8, gpu=small) == []


def test_an_estimate_is_plain_data():
    found = estimate(config_of(pipeline_parallel=4, tensor_parallel=2), world_size=8, gpu=H100).as_dict()
    assert [rank["stage"] for rank in found["ranks"]] == [0, 2, 3] == [int(stage) for stage in found["sent"]]
    assert found["ranks"][0]["total"] > 0 and found["sent"]["0"]["total"] > found["sent"]["0"]["tensor"] > 0
    assert found["gpu"]["name"] == "h100" and found["fits"] is True


def test_uneven_stages_are_shown():
    mesh = estimate(config_of(pipeline_parallel=2, first_stage_layers=1), world_size=2, gpu=H100).mesh
    assert stages_to_show(mesh) == [0, 1]


def test_mistakes():
    with pytest.raises(ConfigError, match="--gpu v100: unknown; expected one of a100, h100, h200, b200"):
        gpu_of("v100")
    with pytest.raises(ParallelError, match="3 processes cannot be divided"):
        estimate(config_of(tensor_parallel=2), world_size=3, gpu=H100)
