"""lambda, sigma, graph and counters: their type, their bounds, and how optimizers treat them."""

import pytest
import torch
from tiny_llama import adapter_state, assert_same, layers, make_batch, make_model
from transformers import Trainer, TrainingArguments

from graphlora.losses import normal_balance
from graphlora.tuner.coordination import Coordination

FLOAT32 = (
    "adjacency",
    "poisson_rate_bias",
    "normal_scale_bias",
    "cumulative_weights",
    "logit_",
    "num_updates",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_stays_float32_when_the_model_is_cast(dtype):
    model = make_model()
    model(**make_batch([5, 3])).loss.backward()
    before = adapter_state(model)
    model.to(dtype)
    after = adapter_state(model)
    kept = {name for name in after if any(part in name for part in FLOAT32)}
    assert len(kept) == 2 * 8
    assert_same({n: before[n] for n in kept}, {n: after[n] for n in kept}, 0.0)
    assert all(after[name].dtype == torch.float32 for name in kept)
    assert after[next(name for name in after if "lora_A" in name)].dtype == dtype


def test_learned_edges_stay_float32():
    state = adapter_state(make_model(edge_init="learned").to(torch.bfloat16))
    assert {state[name].dtype for name in state if "edge_logits" in name} == {torch.float32}


@pytest.mark.parametrize("form", ["smooth", "clamp"])
@pytest.mark.parametrize("bias", [-50.0, -1.0, 0.0, 1.0, 50.0])
def test_lambda_stays_within_one_and_two(form, bias):
    state = Coordination(8, form, "bounded")
    assert state.poisson_rate == 1.5
    torch.nn.init.constant_(state.poisson_rate_bias, bias)
    assert 1 <= state.poisson_rate <= 2


@pytest.mark.parametrize("num_experts", [4, 8, 16])
def test_sigma_starts_at_half_of_n_and_is_bounded_below(num_experts):
    bounded, fixed = (Coordination(num_experts, "smooth", form) for form in ("bounded", "fixed"))
    assert bounded.normal_scale == fixed.normal_scale == num_experts / 2
    assert not any("normal_scale" in name for name, _ in fixed.named_parameters())
    for bias in (-50.0, -3.0, 3.0):
        torch.nn.init.constant_(bounded.normal_scale_bias, bias)
        assert bounded.normal_scale >= num_experts / 4


def loss_of_collapsed_loads(form: str, steps: int = 1000) -> tuple[float, float]:
    """Normal loss of loads 93% on one of eight experts, before and after training sigma alone to cancel it."""
    loads = torch.tensor([[930.0, *[10.0] * 7]])
    state = Coordination(8, "smooth", form)
    optimizer = torch.optim.Adam([state.normal_scale_bias], lr=0.05)
    losses = []
    for _ in range(steps + 1):
        loss = normal_balance(loads, state.normal_scale[None]).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def test_collapsed_loads_stay_expensive():
    """A trained sigma cannot cancel the loss in the default form; the paper's free sigma can."""
    before, after = loss_of_collapsed_loads("bounded")
    assert before > 1.5
    assert after > 0.5 * before
    assert loss_of_collapsed_loads("free")[1] < 0.1 * before


def test_neither_takes_weight_decay_under_the_trainer(tmp_path):
    model = make_model(edge_init="learned")
    arguments = TrainingArguments(tmp_path, weight_decay=0.1, use_cpu=True, report_to="none")
    optimizer = Trainer(model, arguments).create_optimizer()
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    exempt = {name for name in decay if "poisson_rate" in name or "normal_scale" in name}
    assert len(exempt) == 2 * len(layers(model))
    assert {decay[name] for name in exempt} == {0.0}
    assert {decay[name] for name in decay if "lora_A" in name or "out_proj" in name} == {0.1}
    assert set(decay) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_default_lambda_and_sigma_train():
    model = make_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for seed in range(3):
        model(**make_batch([5, 3], seed=seed)).loss.backward()
        optimizer.step()
    for layer in layers(model):
        state = layer.coordination("default")
        assert state.poisson_rate_bias != 0 and state.normal_scale_bias != 0
