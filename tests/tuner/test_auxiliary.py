"""Blocks of unequal shapes are taken together by shape, and their values come back in the order of the blocks."""

from types import SimpleNamespace

import torch

from graphlora.tuner.auxiliary import _groups, _in_order


def test_values_of_groups_come_back_in_the_order_of_the_blocks():
    sizes = (4, 6, 4, 5, 6)
    entries = [
        (
            SimpleNamespace(side="decoder"),
            SimpleNamespace(router_probs=torch.full((3, size), float(block))),
            None,
        )
        for block, size in enumerate(sizes)
    ]
    groups = _groups(entries)
    assert [len(group) for group in groups.values()] == [2, 2, 1]
    per_group = [torch.stack([r.router_probs[0, 0] for _, r, _ in group]) for group in groups.values()]
    assert _in_order(entries, per_group).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
