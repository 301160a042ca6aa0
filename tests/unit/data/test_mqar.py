"""Associative recall: every query has one right answer in the sequence, and nothing else gives it away."""

import numpy as np
import pytest
import torch

from hope_pt.config.schema import DataConfig, MQARConfig
from hope_pt.data import Loader, open_source
from hope_pt.errors import ConfigError


def source_of(split="train", *, vocab_size=64, seq_len=63, **task):
    config = DataConfig(source="mqar", seq_len=seq_len, mqar=MQARConfig(train_samples=500, heldout_samples=40, **task))
    return open_source(config, split=split, vocab_size=vocab_size)


@pytest.mark.parametrize("pairs, queries", [(8, 0), (4, 9), (8, 3), (1, 1)])
def test_queries_ask_for_values_of_the_pairs(pairs, queries):
    source = source_of(num_pairs=pairs, num_queries=queries)
    batch = source.read(np.arange(50))
    for tokens, targets, mask in zip(batch.tokens_BT, batch.targets_BT, batch.loss_mask_BT.bool(), strict=True):
        keys, values = tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == pairs and max(keys) <= source.num_keys < min(values)
        answers = dict(zip(keys, values, strict=True))
        assert mask.sum() == (queries or pairs) and not mask[: 2 * pairs + 8].any()
        assert [answers[k] for k in tokens[mask].tolist()] == targets[mask].tolist()
        assert not set(tokens[2 * pairs :].tolist()) & set(values), "no value may be shown after the pairs"
    assert batch.doc_start_BT[:, 0].all() and batch.doc_start_BT.sum() == 50


def test_values_are_uniform_so_chance_is_one_in_num_values():
    source = source_of(vocab_size=17, num_pairs=4)
    batch = source.read(np.arange(500))
    answers = batch.targets_BT[batch.loss_mask_BT.bool()]
    share = torch.bincount(answers, minlength=17)[1 + source.num_keys :].double() / len(answers)
    assert len(share) == source.num_values == 8
    assert (share - 1 / 8).abs().max() < 0.03  # 2,000 draws: standard deviation 0.0074


def test_sample_is_a_pure_function_of_its_index():
    one, other = source_of(), source_of()
    rows = one.read(np.array([7, 3]))
    again = other.read(np.array([3, 499, 7]))
    assert torch.equal(rows.tokens_BT[0], again.tokens_BT[2]) and torch.equal(rows.tokens_BT[1], again.tokens_BT[0])


def test_splits_and_settings_have_their_own_samples():
    train, heldout = source_of(), source_of("heldout")
    assert (train.num_samples, heldout.num_samples) == (500, 40)
    assert len({train.fingerprint, heldout.fingerprint, source_of(num_pairs=7).fingerprint}) == 3
    both = torch.cat([train.read(np.arange(500)).tokens_BT, heldout.read(np.arange(40)).tokens_BT])
    assert len(both.unique(dim=0)) == 540


def test_loader_runs_over_it():
    config = DataConfig(source="mqar", seq_len=63)
    batch = next(Loader(open_source(config, split="train", vocab_size=64), config=config, global_batch_size=4, dp_rank=1, dp_size=2))
    assert batch.tokens_BT.shape == (2, 63) and batch.tokens_BT.dtype == torch.int64


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seq_len": 30}, "data.seq_len to at least 32"),
        ({"vocab_size": 16}, "raise it to 17"),
        ({"vocab_size": None}, "needs the vocabulary"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        source_of(**settings)
