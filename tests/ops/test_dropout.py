"""Dropout by a hash: the share that it drops, and the kernels against the mask written out."""

import pytest
import torch

pytest.importorskip("triton")
from graphlora.ops.backend import interprets_triton
from graphlora.ops.dropout.reference import hashed_mask
from graphlora.ops.dropout.triton import add_dropped_product, draw_seed, dropped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = pytest.mark.skipif(
    DEVICE == "cpu" and not interprets_triton(), reason="neither a CUDA device nor the interpreter"
)
SEED = 2**31 - 2

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_mask_drops_the_expected_share_without_a_pattern(p):
    mask = hashed_mask(99, 512, 512, p)
    assert abs(float((mask == 0).float().mean()) - p) < 0.003
    assert abs(float(mask.mean()) - 1) < 0.004
    other_seed = hashed_mask(100, 512, 512, p)
    for one, other in ((mask[:-1], mask[1:]), (mask[:, :-1], mask[:, 1:]), (mask, other_seed)):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.01


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(11, 37), (1, 1030), (0, 8)])
def test_dropped_is_the_masked_input(rows, columns, dtype):
    x = torch.randn(rows, columns + 3).to(DEVICE, dtype)[:, 2:-1]
    seed = torch.tensor([SEED], dtype=torch.int32, device=DEVICE)
    expected = (x.float() * hashed_mask(SEED, rows, columns, 0.3, first_column=5).to(DEVICE)).to(dtype)
    assert torch.equal(dropped(x, seed, 0.3, 5), expected)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "n"), [(11, 37, 3), (70, 140, 70)])
def test_the_gradient_of_the_input(rows, columns, n, dtype):
    base = torch.randn(rows, columns).to(DEVICE, dtype)
    low = torch.randn(rows, n + 2).to(DEVICE, dtype)[:, 1:-1]
    weight = torch.randn(n, columns).to(DEVICE, dtype)
    seed = torch.tensor([SEED], dtype=torch.int32, device=DEVICE)
    mask = hashed_mask(SEED, rows, columns, 0.3, first_column=5).to(DEVICE)
    expected = base.double() + mask * (low.double() @ weight.double())
    found = add_dropped_product(base, low, weight, seed, 0.3, 5)
    assert found.dtype == dtype
    assert torch.equal(found, add_dropped_product(base, low, weight, seed, 0.3, 5))
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert float((found.double() - expected).norm() / expected.norm()) < bound


def test_seeds_follow_the_generator():
    torch.manual_seed(3)
    first = draw_seed(torch.device(DEVICE))
    second = draw_seed(torch.device(DEVICE))
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed(torch.device(DEVICE)))
    assert not torch.equal(first, second)
