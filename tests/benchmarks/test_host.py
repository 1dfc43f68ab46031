"""The suite `host`: a step's launches and its time among others of its own."""

import torch
from benchmarks.context import Context, Gate
from benchmarks.registry import SUITES
from benchmarks.suites import host

CPU = torch.device("cpu")


def test_both_times_of_every_candidate():
    case = SUITES["host"].tiny[0]
    context = Context(case, CPU, torch.float32, True, Gate({torch.float32: []}))
    host.measure(context)
    assert {(m.candidate, m.phase) for m in context.found} == {
        (name, phase) for name in case.params["candidates"] for phase in ("host", "in_a_row")
    }
    assert all(m.status == "ok" and m.value > 0 for m in context.found)
