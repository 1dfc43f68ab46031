"""Whole runs as a suite: every candidate trains on the same rows, and only whole blocks of steps are timed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.context import Context, Gate
from benchmarks.registry import SUITES
from benchmarks.suites import runs

CPU = torch.device("cpu")
GRADS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
FUNCTIONS = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def measured(context) -> dict:
    runs.measure(context)
    return {(m.candidate, m.phase): m for m in context.found}


@pytest.fixture
def context() -> Context:
    return Context(SUITES["runs"].tiny[0], CPU, torch.float32, True, Gate({torch.float32: []}))


@GRADS
@FUNCTIONS
def test_whole_runs_are_timed(context):
    found = measured(context)
    assert found["triton_graph", "full"].status == "skipped"
    for name in ("peft_eager", "triton_eager", "triton_compile"):
        assert found[name, "full"].iterations == 2 * 2  # blocks, in each of two rounds
        assert found[name, "full"].value > 0
        assert len(found[name, "before"].extra["rounds"]) == 2
    # Compiled or not, the same model learns the same from the same rows.
    eager, compiled = (found[name, "last_loss"].value for name in ("triton_eager", "triton_compile"))
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert found["peft_eager", "last_loss"].value != pytest.approx(eager, rel=1e-2)


def test_a_run_that_fails_costs_its_candidate_alone(context, monkeypatch):
    original = runs.train

    def train(recipe, **kwargs):
        if recipe.method == "lora":
            raise RuntimeError("out of luck")
        return original(recipe, **kwargs)

    monkeypatch.setattr(runs, "train", train)
    names = ["peft_eager", "triton_eager"]
    context.case = replace(context.case, params=context.case.params | {"candidates": names})
    found = measured(context)
    assert "out of luck" in found["peft_eager", "full"].error
    assert found["triton_eager", "full"].status == "ok"


def test_the_clock_times_blocks_and_what_is_before_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    clock = runs._Clock(CPU, warm=2, blocks=3, block=2)
    clock.on_train_begin(None, None, None)
    for step in range(9):
        clock.on_step_begin(None, SimpleNamespace(global_step=step), None)
        now[0] += 0.01 if step < 4 else 0.03
    assert clock.before == pytest.approx([0.02])
    assert clock.blocks == pytest.approx([10, 30, 30])
