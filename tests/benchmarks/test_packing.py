"""Ways to make a batch of the same rows: all are timed, and what they add to the rows is told."""

from dataclasses import replace

import pytest
import torch
from benchmarks.context import Context, Gate
from benchmarks.failures import NotHere
from benchmarks.registry import SUITES
from benchmarks.suites import cpu_packing, packing

CPU = torch.device("cpu")


@pytest.mark.parametrize("suite", ["packing", "cpu_packing"])
def test_ways_to_join_rows_are_timed(suite):
    context = Context(SUITES[suite].tiny[0], CPU, torch.float32, True, Gate({torch.float32: []}))
    packing.measure(context)
    found = {(m.candidate, m.phase): m for m in context.found}
    tokens = {m.candidate: m for m in context.found if m.phase == "tokens"}
    assert set(tokens) == {"padded", "one_sequence", "blocks", "few_shapes"}
    assert tokens["one_sequence"].value == tokens["one_sequence"].extra["counted"]
    for name, measured in tokens.items():
        assert found[name, "full"].value > 0
        assert measured.value >= tokens["one_sequence"].value
    assert tokens["blocks"].value <= tokens["few_shapes"].value < tokens["padded"].value


def test_a_model_that_fails_the_gate_is_not_timed():
    context = Context(SUITES["packing"].tiny[0], CPU, torch.float32, True, Gate({torch.float32: ["wrong"]}))
    packing.measure(context)
    assert [m.status for m in context.found] == ["failed"]


def test_all_ways_ask_for_the_same_labels():
    rows = packing.random_rows(packing.SHAPES["tiny"], 6, 5, 30)
    labels = {
        name: int((batch.get("shift_labels", batch["labels"][:, 1:]) != packing.IGNORED).sum())
        for name, collate in packing._collators(CPU).items()
        for batch in [collate(rows)]
    }
    assert len(set(labels.values())) == 1


def test_a_cpu_without_bfloat16_is_not_timed_in_it(monkeypatch):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False}, raising=False
    )
    case = SUITES["cpu_packing"].tiny[0]
    case = replace(case, params=case.params | {"dtype": "bfloat16"})
    with pytest.raises(NotHere, match="bfloat16"):
        cpu_packing.measure(Context(case, CPU, torch.bfloat16, True, Gate()))
