"""The watch over kernels' memory sees planted faults, and nothing where there is none."""

import pytest
import torch
import triton
import triton.language as tl

from stellar_fast.kernels.launch import Plan, is_interpreted, launch, target_of

pytestmark = pytest.mark.skipif(
    not is_interpreted(), reason="compiled kernels are compute-sanitizer's to watch"
)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, start, reads, writes, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < reads, other=0.0), mask=at < writes)


def copy(start: int, reads: int, writes: int) -> torch.Tensor:
    x, out = torch.ones(8), torch.zeros(8)
    given = {"start": start, "reads": reads, "writes": writes, "BLOCK": 16}
    plan = Plan(target_of(x.device), _copy_kernel, (1,), {"num_warps": 1}, given)
    launch(plan, x.device, x_ptr=x, out_ptr=out)
    return out


@pytest.mark.usefixtures("bounded")
def test_what_lies_within_passes():
    assert torch.equal(copy(0, 8, 8), torch.ones(8))


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("start", "reads", "writes"), [(0, 9, 8), (0, 8, 9), (-1, 8, 0)])
def test_one_number_too_many_is_seen(start, reads, writes):
    with pytest.raises(Exception, match=r"1 of .* addresses are out of bounds"):
        copy(start, reads, writes)
