"""Section 4.3: activation frequency and expert load."""

from math import log

import pytest
import torch

from graphlora.load import all_ranks_load, batch_load, expert_load, normalized_entropy, windowed_load

WEIGHTS = torch.tensor([[0.75, 0.25], [0.6, 0.4], [1.0, 0.0]])
INDEX = torch.tensor([[0, 2], [2, 1], [0, 3]])


def test_batch_load_adds_the_weight_each_expert_received():
    torch.testing.assert_close(batch_load(WEIGHTS, INDEX, 4, None), torch.tensor([1.75, 0.4, 0.85, 0.0]))


def test_padding_counts_nowhere():
    mask = torch.tensor([True, True, False])
    torch.testing.assert_close(batch_load(WEIGHTS, INDEX, 4, mask), torch.tensor([0.75, 0.4, 0.85, 0.0]))


def test_batch_load_is_differentiable_in_the_weights_that_count():
    weights = WEIGHTS.clone().requires_grad_()
    prices = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (batch_load(weights, INDEX, 4, torch.tensor([1, 0, 1])) * prices).sum().backward()
    torch.testing.assert_close(weights.grad, torch.tensor([[1.0, 3.0], [0.0, 0.0], [1.0, 4.0]]))


@pytest.mark.parametrize(
    ("window", "expected"), [("cumulative", [11.0, 3.0]), ("ema", [9.1, 1.1]), ("batch", [1.0, 2.0])]
)
def test_windows(window, expected):
    history, batch = torch.tensor([10.0, 1.0]), torch.tensor([1.0, 2.0], requires_grad=True)
    load = windowed_load(history, batch, window, decay=0.9)
    torch.testing.assert_close(load.detach(), torch.tensor(expected))
    load.sum().backward()
    share = 0.1 if window == "ema" else 1.0
    torch.testing.assert_close(batch.grad, torch.full((2,), share))


def test_windows_over_several_batches():
    batches = [torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([2.0, 2.0])]
    expected = {"cumulative": [6.0, 6.0], "ema": [1.5, 2.0], "batch": [2.0, 2.0]}
    for window, load in expected.items():
        history = torch.zeros(2)
        for batch in batches:
            history = windowed_load(history, batch, window, decay=0.5)
        torch.testing.assert_close(history, torch.tensor(load))


def test_load_of_all_ranks_has_the_sum_as_value_and_this_rank_as_gradient():
    local = torch.tensor([1.0, 2.0], requires_grad=True)
    load = all_ranks_load(local, torch.tensor([5.0, 3.0]), world_size=4)
    torch.testing.assert_close(load.detach(), torch.tensor([5.0, 3.0]))
    load.sum().backward()
    torch.testing.assert_close(local.grad, torch.full((2,), 4.0))


def test_shares_and_entropy():
    shares = expert_load(torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(shares[0], torch.tensor([0.75, 0.25, 0.0, 0.0]))
    torch.testing.assert_close(shares[1], torch.full((4,), 0.25))
    expected = (0.75 * log(4 / 3) + 0.25 * log(4)) / log(4)
    torch.testing.assert_close(normalized_entropy(shares), torch.tensor([expected, 1.0, 0.0]))
    torch.testing.assert_close(normalized_entropy(torch.ones(2, 1)), torch.ones(2))
