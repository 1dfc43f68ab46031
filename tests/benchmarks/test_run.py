"""The runner on a CPU with tiny sizes: the gate, the candidates, crashes and hangs."""

import json
from dataclasses import replace

import pytest
import torch
from benchmarks.__main__ import _not_measured
from benchmarks.candidates.ffn import TOP_K, FfnBench
from benchmarks.candidates.models import model_config, random_tokens, step_candidate, step_flops
from benchmarks.candidates.routing import random_routing
from benchmarks.cases import Case
from benchmarks.context import Context, Gate
from benchmarks.gate import check, poison, relative_error
from benchmarks.measurement import read
from benchmarks.registry import SUITES
from benchmarks.shapes import LLAMA3_8B, TINY
from benchmarks.suites import curves

import graphlora.moe
from benchmarks import runner, worker
from graphlora.benchmark.random_model import random_model
from graphlora.ops.expert_ffn import expert_ffn_torch
from graphlora.tuner.layer import GraphLoraLayer

CPU = torch.device("cpu")
FAILURES = (RuntimeError, ValueError)


@pytest.fixture
def bench() -> FfnBench:
    return FfnBench(TINY, 2, 24, "skewed", CPU, torch.float32)


# Dynamo of torch 2.13 makes an instance of the function it traces and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["torch", "loop", "expanded", "torch_compiled", "torch_recompute", "torch_joined"]
)
def test_every_routed_candidate_computes_the_same(bench, name):
    truth = bench.candidate("eager").gradients(bench.x, bench.dy)
    values = bench.candidate(name).gradients(bench.x, bench.dy)
    for value, want in zip(values, truth, strict=True):
        assert relative_error(value, want) < 1e-5


def test_the_fused_lora_block_is_plain_lora(bench):
    fused, peft = bench.candidate("fused_lora"), bench.candidate("peft_float32")
    with torch.no_grad():
        for mine, other in zip(fused.inputs, peft.inputs, strict=True):
            mine.copy_(other)
    assert fused.names == peft.names
    for value, want in zip(
        fused.gradients(bench.x, bench.dy), peft.gradients(bench.x, bench.dy), strict=True
    ):
        assert relative_error(value, want) < 1e-5


def test_float64_twin_is_the_same_block(bench):
    double = bench.in_double()
    truth = double.candidate("eager").gradients(double.x, double.dy)
    values = bench.candidate("eager").gradients(bench.x, bench.dy)
    assert truth[0].dtype == torch.float64
    for value, want in zip(values, truth, strict=True):
        assert 0 < relative_error(value, want) < 1e-5


def test_skewed_routing_puts_half_of_all_tokens_on_one_expert():
    skewed = random_routing(1000, 8, 2, "skewed", CPU).top_k_index
    balanced = random_routing(1000, 8, 2, "balanced", CPU).top_k_index
    assert int((skewed == 0).sum()) == 500
    assert int((balanced == 0).sum()) == pytest.approx(250, abs=50)


def test_the_gate_lets_a_right_backend_through():
    assert check("torch", CPU, FAILURES, torch.float32) == []


def test_the_gate_finds_a_wrong_gradient_and_unwritten_memory(monkeypatch):
    def wrong(x, *rest):
        return expert_ffn_torch(x.detach() + 0.999 * (x - x.detach()), *rest)

    def unwritten(*arguments):
        out = expert_ffn_torch(*arguments)
        return torch.cat([out[:-1], out[-1:] * float("nan")])

    for broken, finding in ((wrong, "x is 0.00"), (unwritten, "output is nan")):
        monkeypatch.setattr(graphlora.moe, "expert_ffn_torch", broken)
        assert any(finding in problem for problem in check("torch", CPU, FAILURES, torch.float32))


def test_a_backend_that_fails_the_gate_is_not_timed():
    gate = Gate({torch.float32: ["output is wrong"]})
    context = Context(SUITES["ffn"].tiny[0], CPU, torch.float32, True, gate)
    made = context.build(["frozen", "triton"], lambda name: name)
    assert list(made) == ["frozen"]
    assert context.found[0].status == "failed"
    assert "correctness gate" in context.found[0].error


def test_poison_leaves_nothing_behind():
    poison(CPU)
    assert torch.isfinite(torch.zeros(2048)).all()


def test_the_loop_candidate_really_runs_the_plain_loop(monkeypatch):
    base = random_model(model_config(TINY, 2), CPU, torch.float32)
    ids = random_tokens(TINY, 2, 8, CPU)
    calls = []
    from benchmarks.candidates import models

    plain = models.loop_ffn
    monkeypatch.setattr(models, "loop_ffn", lambda *a: calls.append(1) or plain(*a))
    loop, eager = (step_candidate(name, base) for name in ("loop_r8", "eager_r8"))
    loop.step(ids)
    assert len(calls) == 2
    eager.step(ids)
    assert len(calls) == 2


def test_the_released_way_gives_the_loss_and_gradients_of_eager():
    base = random_model(model_config(TINY, 2), CPU, torch.float32)
    ids = random_tokens(TINY, 2, 8, CPU)
    released, eager = (step_candidate(name, base) for name in ("released_r8", "eager_r8"))
    with torch.no_grad():
        for name, parameter in eager.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    # The routers' offsets are buffers.
    released.model.load_state_dict(eager.model.state_dict())
    assert relative_error(released.forward_backward(ids), eager.forward_backward(ids)) < 1e-6
    for mine, other in zip(released.trained, eager.trained, strict=True):
        assert relative_error(mine.grad, other.grad) < 1e-5


def test_the_released_way_runs_the_down_projection_for_every_choice(monkeypatch):
    base = random_model(model_config(TINY, 2), CPU, torch.float32)
    released = step_candidate("released_r8", base)
    rows = []
    for layer in released.model.modules():
        if isinstance(layer, GraphLoraLayer):
            down = layer.parts.block.down_proj
            down.register_forward_hook(lambda _, inputs, out: rows.append(len(inputs[0])))
    released.forward_backward(random_tokens(TINY, 2, 8, CPU))
    assert sum(rows) == 2 * 16 * TOP_K


def test_flops_follow_the_stated_rule():
    flops = step_flops(LLAMA3_8B, 32, 1, 0, 0)
    # 6.98e9 weights in the layers' products and 0.53e9 in the head.
    assert flops == pytest.approx(4 * 7.5e9, rel=0.01)
    assert step_flops(LLAMA3_8B, 32, 1, 1024, 10) - flops == 60 + 6 * 1024 * 4096 * 32


def test_all_paths_give_the_same_training_curve():
    eager = curves.training_curve("eager", torch.float32, CPU, 12)
    fused = curves.training_curve("torch", torch.float32, CPU, 12)
    assert curves.largest_gap(eager, fused) < 1e-4
    other = curves.training_curve("eager", torch.float32, CPU, 12, seed=1)
    assert curves.largest_gap(eager, other) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_the_same_training_curve(dtype):
    device = torch.device("cuda")
    found = {b: curves.training_curve(b, dtype, device, 100) for b in ("eager", "torch", "triton")}
    spread = curves.largest_gap(found["eager"], curves.training_curve("eager", dtype, device, 100, seed=1))
    limit = 1e-4 if dtype == torch.float32 else spread
    for backend in ("torch", "triton"):
        assert curves.largest_gap(found[backend], found["eager"]) <= limit


def plan(tmp_path, cases, budget=300.0) -> runner.Plan:
    return runner.Plan(cases, "cpu", tmp_path / "new.jsonl", True, budget, "abc", "the command")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_case_leaves_one_line_per_measurement_with_its_provenance(tmp_path):
    assert runner.run(plan(tmp_path, SUITES["router"].tiny)) == 0
    found = read([tmp_path])
    assert {(m.candidate, m.phase) for m in found} == {
        (c, p) for c in ("triton", "torch", "eager") for p in ("forward", "backward", "full")
    }
    assert {m.status for m in found} == {"ok"}
    for m in found:
        assert m.provenance["commit"] == "abc"
        assert m.provenance["command"] == "the command"
        assert m.params["dtype"] == "float32"
        assert m.iterations == 3
        assert m.low <= m.value <= m.high


def test_resume_says_which_commits_measured_what_it_leaves_out(tmp_path, capsys):
    """Else nothing is measured of a new commit, and nothing is said."""
    case, other = SUITES["router"].cases[:2]
    runner.run(plan(tmp_path, SUITES["router"].tiny[:1]))
    measured = [replace(m, case=case.name, tiny=False) for m in read([tmp_path])]
    assert _not_measured([case, other], measured) == [other]
    assert "1 of 2 cases are measured already (commits abc)" in capsys.readouterr().out
    assert _not_measured([other], measured) == [other]
    assert not capsys.readouterr().out


def test_a_crash_is_recorded_and_the_next_case_is_measured(tmp_path, monkeypatch):
    order = []

    def work(plan, waiting, folder, session, deadline):
        order.append(list(waiting))
        suite, name = waiting[0]
        if len(order) == 1:
            (folder / "marker.json").write_text(json.dumps([suite, name, 0.0, "SomeError: words"]))
            return "the worker ended with exit code 1"
        from benchmarks.measurement import Measurement, append

        append(plan.out, [Measurement(suite, name, "x", "full", value=1.0, session=session, tiny=True)])
        return None

    monkeypatch.setattr(runner, "_work", work)
    cases = [*SUITES["router"].tiny, *SUITES["saved"].tiny]
    assert runner.run(plan(tmp_path, cases)) == 0
    first, second = read([tmp_path])
    assert (first.suite, first.status) == ("router", "failed")
    assert "SomeError: words" in first.error
    assert (second.suite, second.status) == ("saved", "ok")
    assert [len(waiting) for waiting in order] == [2, 1]


def test_a_case_that_hangs_is_given_up(tmp_path, monkeypatch):
    marker = tmp_path / "marker.json"
    case = SUITES["router"].tiny[0]
    marker.write_text(json.dumps([case.suite, case.name, 0.0]))
    assert runner._hangs(marker, tiny=True) == pytest.approx(90)
    assert runner._hangs(tmp_path / "none.json", tiny=True) is None


def test_a_failing_suite_is_recorded(tmp_path, monkeypatch):
    context = Context(Case("router", "x", {"shape": "tiny", "tokens": 4}), CPU, torch.float32, True, Gate())
    assert not worker._measure(context)
    (failed,) = context.found
    assert failed.status == "failed"
    assert "KeyError: 'width'" in failed.error
