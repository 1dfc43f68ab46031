"""Sizes on the host equal Triton's own arithmetic."""

import pytest

from graphlora.ops.sizes import ceil_div, next_power_of_2

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4095, 4096, 2**31 + 3])
def test_parts_that_cover(size):
    for part in (1, 3, 8, 128):
        assert ceil_div(size, part) == triton.cdiv(size, part)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 1023, 1024, 14336, 2**31 + 1])
def test_powers_of_two(n):
    assert next_power_of_2(n) == triton.next_power_of_2(n)
