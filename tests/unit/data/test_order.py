"""The order of samples: a permutation in every epoch, local, the same however it is asked, and fixed for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_pt.data import sample_order


def order(positions, *, n=100, seed=0, fingerprint="f", block=8):
    return sample_order(np.asarray(positions), num_samples=n, seed=seed, fingerprint=fingerprint, shuffle_block=block)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), block=st.integers(1, 400), epoch=st.integers(0, 3), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, block, epoch, seed):
    indices = order(epoch * n + np.arange(n), n=n, block=block, seed=seed)
    assert sorted(indices.tolist()) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(positions=st.lists(st.integers(0, 1000), max_size=40), n=st.integers(1, 120), block=st.integers(1, 130))
def test_any_positions_give_the_same_as_all_positions(positions, n, block):
    every = order(np.arange(1001), n=n, block=block)
    assert order(np.array(positions, np.int64), n=n, block=block).tolist() == every[np.array(positions, np.int64)].tolist()


def test_blocks_stay_together():
    indices = order(np.arange(96), n=96, block=8)
    assert all(len(set(indices[i : i + 8] // 8)) == 1 for i in range(0, 96, 8))
    assert (np.diff(indices[::8] // 8) != 1).any()


@pytest.mark.parametrize("change", [{"seed": 1}, {"fingerprint": "g"}, {"block": 9}])
def test_order_depends_on(change):
    assert (order(np.arange(100)) != order(np.arange(100), **change)).any()


def test_epochs_differ():
    assert (order(np.arange(100)) != order(100 + np.arange(100))).any()


def test_order_is_fixed():
    """These numbers stand in no file but here: a change of the algorithm would silently reorder every run that resumes."""
    assert order(np.arange(12), n=12, block=5).tolist() == [9, 8, 7, 5, 6, 10, 11, 0, 4, 1, 3, 2]


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="start at 0"):
        order([-1])


def test_far_positions_need_little_memory():
    indices = order([90_000_000_007, 99_999_999], n=100_000_000, block=8192)
    assert ((0 <= indices) & (indices < 100_000_000)).all()
