"""Sums of products: their value, in place where nothing looks, one operation where a compiler does."""

import pytest
import torch
from host_reads import Calls
from torch.utils.flop_counter import FlopCounterMode

from graphlora.ops.products import product_float32, sum_of_products


def factors(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    lefts = [torch.randn(5, 2 + i, generator=generator).to(dtype) for i in range(count)]
    rights = [torch.randn(7, 2 + i, generator=generator).to(dtype).T for i in range(count)]
    return lefts, rights, torch.randn(7, generator=generator).to(dtype)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_equals_the_sum(count, biased, compiled):
    lefts, rights, bias = factors(count)
    bias = bias if biased else None
    expected = sum(left @ right for left, right in zip(lefts, rights, strict=True))
    expected = expected if bias is None else expected + bias
    kept = [t.clone() for t in (*lefts, *rights)]
    function = (
        torch.compile(sum_of_products, backend="aot_eager", fullgraph=True) if compiled else sum_of_products
    )
    torch.testing.assert_close(function(lefts, rights, bias), expected)
    for tensor, before in zip((*lefts, *rights), kept, strict=True):
        assert torch.equal(tensor, before)


def test_columns_of_a_wider_tensor_are_factors_too():
    wide, rights, _ = torch.randn(5, 9), [torch.randn(4, 3), torch.randn(5, 3)], None
    expected = wide[:, :4] @ rights[0] + wide[:, 4:] @ rights[1]
    torch.testing.assert_close(sum_of_products(wide.split([4, 5], dim=1), rights), expected)


def test_a_compiler_gets_one_operation():
    """As `addmm` each sum would be copied first: the compiler gives its result memory of its own."""
    names = []

    def keep(module, _):
        names.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    lefts, rights, bias = factors(3)
    torch.compile(sum_of_products, backend=keep, fullgraph=True)(lefts, rights, bias)
    assert names == ["graphlora.sum_of_products.default"]


def test_the_operation_is_what_pytorch_asks_of_one():
    lefts, rights, bias = factors(3)
    for arguments in ((lefts, rights, bias), (lefts[:1], rights[:1], None)):
        torch.library.opcheck(torch.ops.graphlora.sum_of_products.default, arguments)


def test_modes_see_products_and_none_in_place():
    """Counters of operations know what a product costs, and selective checkpointing keeps what is not written to."""
    lefts, rights, bias = factors(3)
    with Calls() as calls:
        sum_of_products(lefts, rights, bias)
    assert [name.partition(".")[2] for name in calls.names] == ["addmm.default"] * 3
    with FlopCounterMode(display=False) as counted:
        sum_of_products(lefts, rights, bias)
    assert counted.get_total_flops() == 2 * 5 * 7 * (2 + 3 + 4)


@pytest.mark.parametrize("widen", [True, False])
def test_products_in_float32_of_narrow_factors(widen):
    left, right, _ = factors(1, torch.bfloat16)
    found = product_float32(left[0], right[0], widen_factors=widen)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, left[0].float() @ right[0].float(), rtol=0.02, atol=0.02)
