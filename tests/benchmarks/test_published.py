"""The published MoE-LoRA code that is measured beside this project, where it is installed."""

from importlib.metadata import version

import pytest
import torch
from benchmarks.candidates import published
from benchmarks.candidates.ffn import NUM_EXPERTS, TOP_K
from benchmarks.candidates.models import (
    ModelCandidate,
    active_adapter_weights,
    model_config,
    random_tokens,
    step_candidate,
)
from benchmarks.context import Context, Gate
from benchmarks.registry import SUITES
from benchmarks.shapes import TINY, Shape

from benchmarks import worker
from graphlora.benchmark.random_model import random_model

CPU = torch.device("cpu")
NAME = "moe_peft_mixlora_r8"
QWEN = Shape("tiny-qwen", "qwen2", 32, 64, 2, 4, 2, 64)


@pytest.fixture(params=[TINY, QWEN], ids=["llama", "qwen2"])
def shape(request) -> Shape:
    pytest.importorskip("evaluate")
    pytest.importorskip("moe_peft")
    if version("moe_peft") != published.VERSION:
        pytest.skip(f"another version than {published.VERSION}")
    return request.param


def candidate_and_base(shape: Shape, dtype: torch.dtype) -> tuple[ModelCandidate, torch.nn.Module]:
    base = random_model(model_config(shape, 2), CPU, dtype)
    return step_candidate(NAME, base), base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_adapter_that_adds_nothing_leaves_the_frozen_model(shape, dtype):
    candidate, base = candidate_and_base(shape, dtype)
    ids = random_tokens(shape, 2, 16, CPU)
    with torch.no_grad():
        mine = candidate.model(input_ids=ids, labels=ids)
        frozen = base(input_ids=ids, labels=ids)
    # Rounding alone: a half precision's, or float32's.
    bound = 1e-6 if dtype == torch.float32 else 2**-7
    assert float((mine.logits - frozen.logits).abs().max() / frozen.logits.abs().max()) < bound
    # The router's loss comes on top: 0.001 times 2 where the experts' load is even, times 8 where all is on two.
    extra = float(mine.loss - frozen.loss)
    assert 1e-3 < extra < 1e-2


def test_all_of_the_adapter_is_trained_and_nothing_else(shape):
    candidate, base = candidate_and_base(shape, torch.float32)
    assert isinstance(candidate.model, published.MoePeftModel)
    before = {name: p.clone() for name, p in base.named_parameters()}
    adapter = candidate.model.weights
    assert {id(p) for p in candidate.trained} == {id(p) for p in adapter.values()}
    with torch.no_grad():
        for name, parameter in adapter.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    ids = random_tokens(shape, 4, 64, CPU)
    loss = candidate.forward_backward(ids)
    assert torch.isfinite(loss)
    for name, parameter in adapter.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    values = [p.detach().clone() for p in candidate.trained]
    candidate.step(ids)
    assert all(not torch.equal(p, old) for p, old in zip(candidate.trained, values, strict=True))
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_what_a_token_uses_and_what_the_model_holds_are_counted(shape):
    candidate, base = candidate_and_base(shape, torch.float32)
    d, f, r, layers = shape.hidden_size, shape.intermediate_size, 8, 2
    kv = shape.num_kv_heads * shape.head_size
    attention = r * (2 * 2 * d + 2 * (d + kv))
    expert = r * 3 * (d + f)
    router = NUM_EXPERTS * d
    assert sum(p.numel() for p in candidate.trained) == layers * (attention + NUM_EXPERTS * expert + router)
    assert active_adapter_weights(candidate.model) == layers * (attention + TOP_K * expert + router)
    held = sum(t.numel() for t in (*base.parameters(), *candidate.trained)) * 4
    assert held <= candidate.own_bytes() < 1.01 * held


def test_it_is_measured_beside_the_others(shape):
    case = SUITES["step"].tiny[0]
    params = {**case.params, "candidates": ["frozen", NAME]}
    context = Context(type(case)(case.suite, case.name, params), CPU, torch.float32, True, Gate())
    assert not worker._measure(context)
    assert {m.status for m in context.found} == {"ok"}
    assert {m.phase for m in context.found if m.candidate == NAME} >= {"full", "peak_memory", "mfu"}


@pytest.mark.parametrize("missing", ["moe_peft", "evaluate"])
def test_what_is_not_installed_is_skipped_with_the_line_that_installs_it(monkeypatch, missing):
    monkeypatch.setattr(published, "find_spec", lambda name: None if name == missing else object())
    base = random_model(model_config(TINY, 2), CPU, torch.float32)
    context = Context(SUITES["step"].tiny[0], CPU, torch.float32, True, Gate())
    made = context.build(["frozen", NAME], lambda name: step_candidate(name, base))
    assert list(made) == ["frozen"]
    (skipped,) = context.found
    assert (skipped.candidate, skipped.status) == (NAME, "skipped")
    assert skipped.error == f"{missing} is not installed: pip install --no-deps moe-peft==2.0.2 evaluate"


def test_another_version_is_not_measured(monkeypatch):
    monkeypatch.setattr(published, "find_spec", lambda name: object())
    monkeypatch.setattr(published, "version", lambda name: "3.0")
    base = random_model(model_config(TINY, 2), CPU, torch.float32)
    context = Context(SUITES["step"].tiny[0], CPU, torch.float32, True, Gate())
    assert not context.build([NAME], lambda name: step_candidate(name, base))
    assert context.found[0].error == "moe_peft is 3.0 here: pip install --no-deps moe-peft==2.0.2 evaluate"
