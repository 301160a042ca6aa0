"""What the trials compare, without a cluster: every difference must be seen, and the ledger must not depend on the layout."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from hope_pt import data
from hope_pt.config.schema import DataConfig
from tools.slurm_trials import trainer
from tools.slurm_trials.training import Outcome, differences, ledger

SEEN = Outcome(
    metrics=[{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.5}],
    weights={"rank-0.safetensors": "a"},
    consumed=4,
    ledger={position: {f"sample {position}"} for position in range(4)},
)


def test_equal_runs_do_not_differ():
    assert differences(SEEN, replace(SEEN)) == []
    ahead = {**SEEN.ledger, 4: {"sample 4"}}
    assert differences(SEEN, replace(SEEN, ledger=ahead)) == [], "a session that was killed may have read further than it got"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"metrics": [SEEN.metrics[0], {"step": 2, "loss": 3.5000001}]}, "metrics line 2 differs"),
        ({"metrics": SEEN.metrics[:1]}, "metrics has 1 lines"),
        ({"weights": {"rank-0.safetensors": "b"}}, "weights of the last checkpoint differ"),
        ({"weights": {}}, "weights of the last checkpoint differ"),
        ({"consumed": 5}, "5 samples read"),
        ({"ledger": {0: {"sample 0"}, 1: {"sample 1"}, 3: {"sample 3"}}}, "samples lost at positions [2]"),
        ({"ledger": {**SEEN.ledger, 2: {"sample 2", "sample 1"}}}, "other samples at positions [2]"),
        ({"ledger": {**SEEN.ledger, 2: {"sample 3"}}}, "other samples at positions [2]"),
    ],
)
def test_a_difference_is_seen(change, sentence):
    found = differences(SEEN, replace(SEEN, **change))
    assert len(found) == 1 and sentence in found[0]


def test_a_reference_that_repeats_a_sample_is_no_reference():
    repeated = replace(SEEN, ledger={**SEEN.ledger, 3: {"sample 0"}})
    assert "3 different samples at 4 positions" in differences(repeated, repeated)[0]


def test_the_ledger_is_that_of_the_samples_in_any_layout(tmp_path, monkeypatch):
    config = DataConfig(source="mqar", seq_len=32)
    source = data.open_source(config, split="train", vocab_size=32)
    ledgers = []
    for size, start in ((1, 0), (2, 4), (4, 8)):
        run = SimpleNamespace(path=tmp_path / f"{size}" / "run")
        run.path.mkdir(parents=True)
        for rank in range(size):
            with monkeypatch.context() as patch:
                # The wrapper replaces them for the rest of its process.
                patch.setattr(data.Loader, "__init__", data.Loader.__init__)
                patch.setattr(data.Loader, "__next__", data.Loader.__next__)
                trainer.record_batches(run.path.parent / f"ledger-{rank}")
                loader = data.Loader(source, config=config, global_batch_size=4, dp_rank=rank, dp_size=size, start_sample=start)
                for _ in range(5 - start // 4):
                    next(loader)
        ledgers.append(ledger(run))
    whole, *later = ledgers
    assert sorted(whole) == list(range(20)) and all(len(digests) == 1 for digests in whole.values())
    for found in later:
        assert found == {position: whole[position] for position in found} and max(found) == 19
