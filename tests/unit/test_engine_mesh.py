"""The arithmetic of layouts: coordinates, the blocks of a stage, and every combination that is impossible or silently wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import CMSConfig, DataConfig, EngineConfig, ModelConfig, MQARConfig, RunConfig, TrainConfig
from hope_pt.engine.mesh import check_mesh
from hope_pt.errors import ConfigError, ParallelError


def config_of(*, layers=12, heads=8, rows=32, seq_len=64, segments=1, **engine):
    return RunConfig(
        name="mesh",
        model=ModelConfig(vocab_size=64, num_layers=layers, width=64, num_heads=heads, cms=CMSConfig(hidden=96)),
        data=DataConfig(source="mqar", seq_len=seq_len, mqar=MQARConfig(gap=3 * layers + 1)),
        optim=OptimConfig(),
        engine=EngineConfig(**{"micro_batch_size": 1, **engine}),
        train=TrainConfig(steps=1, global_batch_size=rows, segments=segments),
    )


@given(
    tensor=st.sampled_from([1, 2, 4]), context=st.sampled_from([1, 2]), pipeline=st.sampled_from([1, 2, 3]), data=st.sampled_from([1, 2])
)
def test_ranks_have_distinct_coordinates_with_tensor_fastest(tensor, context, pipeline, data):
    config = config_of(tensor_parallel=tensor, context_parallel=context, pipeline_parallel=pipeline)
    mesh = check_mesh(config, world_size=tensor * context * pipeline * data)
    found = [tuple(mesh.coordinates(rank)[axis] for axis in ("pipeline", "data", "context", "tensor")) for rank in range(mesh.world_size)]
    assert found == sorted(set(found)) and len(found) == tensor * context * pipeline * data
    assert found[-1] == (pipeline - 1, data - 1, context - 1, tensor - 1)


def test_a_layout_in_words():
    config = config_of(tensor_parallel=2, context_parallel=4, pipeline_parallel=3, virtual_stages=2, rows=15)
    assert check_mesh(config, world_size=120).describe() == "tensor 2, context 4, data 5, pipeline 3 x 2"


@given(pipeline=st.sampled_from([1, 2, 3, 4, 6]), virtual=st.sampled_from([1, 2]))
def test_stages_hold_every_block_once(pipeline, virtual):
    pieces = virtual if pipeline > 1 else 1
    mesh = check_mesh(config_of(layers=24, rows=24, pipeline_parallel=pipeline, virtual_stages=pieces), world_size=pipeline)
    order = [block for piece in range(pieces) for stage in range(pipeline) for block in mesh.layers(stage, piece)]
    assert order == list(range(24)), "depth runs through the stages, piece after piece"


def test_uneven_stages():
    mesh = check_mesh(config_of(layers=10, pipeline_parallel=4, first_stage_layers=1, last_stage_layers=3), world_size=4)
    assert mesh.stage_layers == (1, 3, 3, 3)
    assert [list(mesh.layers(stage)) for stage in (0, 3)] == [[0], [7, 8, 9]]
    assert check_mesh(config_of(layers=10, pipeline_parallel=2, last_stage_layers=4), world_size=2).stage_layers == (6, 4)


def test_counts_of_a_step():
    mesh = check_mesh(config_of(rows=32, segments=2, context_parallel=2, micro_batch_size=2), world_size=8)
    assert (mesh.data, mesh.num_microbatches, mesh.tokens_per_rank) == (4, 32 // 4 // 2 * 2, 64 // 2 // 2)


@pytest.mark.parametrize(
    ("settings", "world_size", "error", "words"),
    [
        ({"tensor_parallel": 2}, 3, ParallelError, r"3 processes cannot be divided into groups .* = 2 \* 1 \* 1 = 2; start a multiple"),
        ({"tensor_parallel": 16}, 16, ParallelError, r"num_heads = 8 is not a multiple of engine\.tensor_parallel = 16; .* 1, 2, 4 or 8"),
        ({"tensor_parallel": 2, "context_parallel": 8}, 16, ParallelError, r'whole heads; lower one of the two, or set'),
        ({"context_parallel": 5, "context_mode": "state"}, 5, ConfigError, r"data\.seq_len = 64 is not a multiple of 5"),
        ({"context_parallel": 2, "context_mode": "state", "segments": 2}, 2, ParallelError, r"train\.segments = 2 does not go with"),
        ({"seq_len": 60, "tensor_parallel": 8}, 8, ConfigError, r"60 tokens .* engine\.sequence_parallel = false"),
        ({"overlap_param_gather": True}, 1, ParallelError, r"needs engine\.distributed_optimizer = true and engine\.overlap_grad_reduce"),
        ({"rows": 6}, 4, ConfigError, r"train\.global_batch_size = 6 is not a multiple of 4"),
        ({"first_stage_layers": 2}, 1, ParallelError, r"with one pipeline stage; set both to 0"),
        ({"pipeline_parallel": 5}, 5, ParallelError, r"model\.num_layers = 12 cannot be divided over 5 of engine\.pipeline_parallel = 5"),
        ({"pipeline_parallel": 2, "first_stage_layers": 12}, 2, ParallelError, r"12 less 12 on the first and 0 on the last stage"),
        ({"virtual_stages": 2}, 1, ParallelError, r"engine\.virtual_stages = 2 needs engine\.pipeline_parallel > 1"),
        ({"pipeline_parallel": 2, "virtual_stages": 2, "overlap_p2p": False}, 2, ParallelError, r"silently wrong; set engine\.overlap_p2p"),
        ({"pipeline_parallel": 2, "virtual_stages": 4}, 2, ParallelError, r"6 blocks a stage .* set it to 1, 2, 3 or 6"),
        ({"pipeline_parallel": 2, "virtual_stages": 2, "first_stage_layers": 4}, 2, ParallelError, r"divides every stage evenly"),
        ({"pipeline_parallel": 4, "virtual_stages": 3, "rows": 6}, 4, ParallelError, r"6 micro-batches a step are not a multiple of"),
    ],
)  # fmt: skip
def test_impossible_or_silently_wrong_layouts_are_refused_with_the_key(settings, world_size, error, words):
    with pytest.raises(error, match=words):
        check_mesh(config_of(**settings), world_size=world_size)
