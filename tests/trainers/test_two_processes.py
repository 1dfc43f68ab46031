"""Two processes (gloo): loads and the normal loss see both, the auxiliary loss keeps its weight, state stays equal."""

from pathlib import Path

import pytest
import torch
from reliability.launching import launch
from tiny_llama import assert_same, gradients, loads, make_batch, make_model
from tiny_trainers import router_part, run_sft, run_trainer
from two_ranks import EQUAL, LENGTHS, NORMAL_ONLY, POISSON_ONLY, UNEQUAL

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saved; one start of two processes serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    launch([SUPPORT / "two_ranks.py", folder], 2, timeout=300.0)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def both_batches():
    """The first batches of the two ranks as one."""
    width = max(map(max, LENGTHS))
    parts = [make_batch(lengths, width, seed=rank) for rank, lengths in enumerate(LENGTHS)]
    return {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "attention_mask")}


def test_one_reduction_per_training_forward_and_none_elsewhere(ranks):
    expected = {"training": 1, "evaluation": 0, "no gradients": 0, "generation": 0}
    assert [rank["reductions"] for rank in ranks] == [expected, expected]


@pytest.mark.parametrize(("case", "config"), [("unequal normal", NORMAL_ONLY), ("unequal", {})])
def test_losses_and_loads_are_those_of_the_whole_batch(ranks, case, config):
    """Of ranks with unequal batches; the averaged gradient is the one that a single process computes."""
    model = make_model(**config)
    out = model(**both_batches())
    out.aux_loss.backward()
    expected = {n: g for n, g in gradients(model).items() if g.abs().max() > 0}
    assert len(expected) > 10
    mean = (ranks[0][case]["aux_loss"] + ranks[1][case]["aux_loss"]) / 2
    assert_same({"aux_loss": out.aux_loss.detach()}, {"aux_loss": mean}, 1e-6)
    for rank in ranks:
        assert_same({"loads": loads(model)}, {"loads": rank[case]["loads"]}, 1e-6)
        ours = {n: g for n, g in rank[case]["gradients"].items() if g.abs().max() > 0}
        assert_same(expected, ours, 1e-6)


@pytest.mark.parametrize("case", ["unequal", "trainer"])
def test_every_rank_holds_the_same_state(ranks, case):
    assert_same(ranks[0][case]["state"], ranks[1][case]["state"], 0.0)


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_two_processes_equal_one_with_the_same_batch(ranks, kind, tmp_path):
    """Both losses, over two steps, with equal micro-batches."""
    one = (run_trainer if kind == "trainer" else run_sft)(tmp_path, EQUAL)[0]
    for rank in ranks:
        steps = rank[kind]["steps"] if kind == "trainer" else rank[kind]
        for ours, theirs in zip(one, steps, strict=True):
            assert_same(router_part(ours), router_part(theirs), 1e-5)
            assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize(("kind", "case"), [("trainer", "accumulated"), ("sft", "sft accumulated")])
def test_accumulation_on_two_processes_keeps_the_poisson_part(ranks, kind, case, tmp_path):
    one = (run_trainer if kind == "trainer" else run_sft)(tmp_path, EQUAL, config=POISSON_ONLY)[0]
    for ours, theirs in zip(one, ranks[0][case], strict=True):
        assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("case", "accumulation", "collator"),
    [
        ("padding", 1, "padding"),
        ("packing", 1, "packing"),
        ("unequal accumulated", 2, "padding"),
        ("sft unequal", 1, "sft"),
    ],
)
def test_two_processes_with_unequal_numbers_of_tokens_equal_one(
    ranks, case, accumulation, collator, tmp_path
):
    """Both losses, over two steps; with packing, the processes differ in labels per token too."""
    if collator == "sft":
        one = run_sft(tmp_path, UNEQUAL)[0]
    else:
        one = run_trainer(tmp_path, UNEQUAL, accumulation, collator)[0]
    assert len(one) == 2
    for rank in ranks:
        for ours, theirs in zip(one, rank[case], strict=True):
            assert_same(router_part(ours), router_part(theirs), 1e-5)
            assert_same(ours, theirs, 1e-5)


def test_coefficient_zero_trains_on_two_processes(ranks):
    assert len(ranks[0]["sft off"]) == 2
    for name, gradient in ranks[0]["sft off"][0].items():
        if name.endswith(("poisson_rate_bias", "normal_scale_bias")):
            assert not gradient.any()
