"""The counter of live bytes against tensors whose size is known, on both devices."""

import pytest
import torch

from hope_pt.launch.allocations import AllocationCounter

KIB = 1024


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_and_peak_follow_storages(device):
    outside = torch.empty(KIB // 4, device=device)
    with AllocationCounter([outside]) as counter:
        a = torch.empty(KIB // 4, device=device)
        view, same = a[:2], outside.view(-1)
        b = a + outside
        assert counter.live == 2 * KIB, "views and tensors from outside add nothing"
        c = b.exp()
        del b, c
        assert (counter.live, counter.peak) == (KIB, 3 * KIB)
        del a
        assert counter.live == KIB, "a view keeps its storage"
        del view, same
        assert counter.live == 0
        counter.restart_peak()
        assert counter.peak == 0


def test_what_autograd_keeps_is_alive():
    x = torch.empty(KIB // 4, device="meta", requires_grad=True)
    with AllocationCounter([x]) as counter:
        y = x.exp().sin().sum()
        assert counter.live == KIB + 4, "exp keeps its result, sin its input, which is the same tensor; the sum keeps neither"
        y.backward()
        del y
        assert counter.live == KIB, "the gradient"


def test_kernels_and_traffic_leave_views_and_allocations_out():
    with AllocationCounter() as counter:
        a = torch.zeros(KIB // 4, device="meta")
        a.view(2, -1).mul_(2)
        torch.cat([a, a])
        torch.empty_like(a)
    assert counter.kernels == 3
    assert counter.traffic == KIB + 2 * KIB + 4 * KIB
