"""What is measured on a CPU: both dtypes, and bfloat16 only where the CPU computes it."""

import json

import pytest
import torch
from benchmarks.cases import Case
from benchmarks.context import Context, Gate
from benchmarks.failures import NotHere
from benchmarks.measurement import read
from benchmarks.registry import SUITES
from benchmarks.suites import cpu, cpu_step
from benchmarks.worker import main

CPU = torch.device("cpu")


def has_bfloat16(monkeypatch, found: bool) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": found, "amx_bf16": False}, raising=False
    )


def in_bfloat16(case: Case) -> Case:
    return Case(case.suite, case.name, case.params | {"dtype": "bfloat16"}, case.seconds)


@pytest.mark.parametrize("suite", [cpu, cpu_step])
def test_a_cpu_without_bfloat16_is_not_timed_in_it(monkeypatch, suite):
    case = in_bfloat16(SUITES[suite.__name__.rpartition(".")[2]].tiny[0])
    has_bfloat16(monkeypatch, False)
    with pytest.raises(NotHere, match="bfloat16"):
        suite.measure(Context(case, CPU, torch.bfloat16, True, Gate()))


@pytest.mark.parametrize("suite", [cpu, cpu_step])
def test_weights_and_input_are_in_the_dtype_of_the_case(monkeypatch, suite):
    case = in_bfloat16(SUITES[suite.__name__.rpartition(".")[2]].tiny[0])
    has_bfloat16(monkeypatch, True)
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *args: seen.append(x.dtype) or linear(x, *args)
    )
    context = Context(case, CPU, torch.bfloat16, True, Gate())
    suite.measure(context)
    assert {m.status for m in context.found} == {"ok"}
    assert torch.bfloat16 in seen
    assert context.finished()[0].params["dtype"] == "bfloat16"


def test_the_worker_takes_the_dtype_of_the_case(tmp_path, monkeypatch):
    case = in_bfloat16(SUITES["cpu"].tiny[0])
    has_bfloat16(monkeypatch, True)
    monkeypatch.setattr("benchmarks.worker.find_case", lambda *_: case)
    plan = {
        "cases": [[case.suite, case.name]], "device": "cpu", "out": str(tmp_path / "found.jsonl"),
        "marker": str(tmp_path / "marker"), "session": "s", "tiny": True, "deadline": 0.0, "commit": "abc",
        "command": "the command",
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert main(tmp_path / "plan.json") == 0
    assert {m.params["dtype"] for m in read([tmp_path])} == {"bfloat16"}
