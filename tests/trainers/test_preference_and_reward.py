"""TRL's DPO, KTO and GRPO trainers train a GraphLoRA adapter, with the auxiliary loss added once."""

import math

import pytest
import torch
from datasets import Dataset
from tiny_llama import adapter_config, adapter_state, assert_same, layers, loads, make_base, make_model
from tiny_trainers import Gradients, arguments, make_tokenizer, router_part
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

PAIRS = [
    {"prompt": f"t{i} t{i + 1}", "chosen": f" t{i + 2} t3", "rejected": f" t4 t5 t{i + 3}"}
    for i in range(5, 13)
]
RATINGS = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)
]
OFF = {"router_poisson_loss_coef": 0.0, "router_normal_loss_coef": 0.0}


def reward(completion_ids, **_):
    """Prefers even tokens."""
    return [float(sum(token % 2 == 0 for token in ids)) for ids in completion_ids]


TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}, {}),
    "kto": (KTOTrainer, KTOConfig, RATINGS, {}, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        [{"prompt": row["prompt"]} for row in PAIRS],
        {"num_generations": 4, "max_completion_length": 4, "beta": 0.1},
        {"reward_funcs": reward},
    ),
}


def train(kind, folder, model=None, config=None, **overrides):
    trainer_class, config_class, rows, options, extra = TRAINERS[kind]
    options = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "bf16": False, **options}
    recorder = Gradients()
    trainer = trainer_class(
        model if model is not None else make_base(),
        args=config_class(**arguments(folder, **{**options, **overrides})),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=adapter_config(**(config or {})) if model is None else None,
        callbacks=[recorder],
        **extra,
    )
    trainer.train()
    return recorder.steps, trainer


def logged(trainer):
    return {name: value for row in trainer.state.log_history for name, value in row.items()}


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_trains_as_peft_config(kind, tmp_path):
    steps, trainer = train(kind, tmp_path)
    assert len(steps) == 2
    assert logged(trainer)["aux_loss"] > 0.01
    assert loads(trainer.model).sum() > 0
    assert all(torch.isfinite(value).all() for value in adapter_state(trainer.model).values())


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_auxiliary_loss_is_added_once(kind, tmp_path):
    """lambda and sigma get nothing but the auxiliary loss: their gradient follows its weight, and is that of one loss.

    At step 0 all experts are alike (B is zero), so the first step's router gradient is the auxiliary loss's alone.
    """
    once, trainer = train(kind, tmp_path)
    twice, _ = train(kind, tmp_path, router_aux_loss_coef=2.0)
    off, off_trainer = train(kind, tmp_path, router_aux_loss_coef=0.0)
    assert_same({n: 2 * g for n, g in router_part(once[0]).items()}, router_part(twice[0]), 1e-5)
    assert not any(g.abs().max() > 1e-7 for g in router_part(off[0]).values())
    assert "aux_loss" not in logged(off_trainer)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_weight_is_that_of_one_auxiliary_loss(kind, tmp_path):
    captured = []

    def keep(module, args, kwargs, outputs):
        if torch.is_grad_enabled():
            captured.append({n: kwargs[n] for n in ("input_ids", "attention_mask")})

    base = make_base()
    base.register_forward_hook(keep, with_kwargs=True)
    steps, _ = train(kind, tmp_path, make_model(base=base))
    model = make_model()
    model(**captured[0]).aux_loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if n.endswith(("rate_bias", "scale_bias"))}
    assert_same(expected, {n: steps[0][n] for n in expected}, 1e-5)


def test_accumulation_keeps_the_weight(tmp_path, monkeypatch):
    """DPO, Poisson part: what the router gets does not depend on how the batch is cut."""
    monkeypatch.setitem(TRAINERS, "same rows", (DPOTrainer, DPOConfig, [PAIRS[0]] * 8, {}, {}))
    config = {"router_normal_loss_coef": 0.0}
    whole, cut = (
        train(
            "same rows",
            tmp_path,
            config=config,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        )[0][0]
        for accumulation in (1, 2)
    )
    assert_same(router_part(whole), router_part(cut), 1e-5)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_reference_of_a_trained_adapter_is_that_adapter(kind, tmp_path):
    """TRL copies parameters into an adapter named ref; graph, features and centering must come along."""
    model = make_model(expert_features="projected", edge_init="similarity")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randint(1, 32, (2, 8))).aux_loss.backward()
        optimizer.step()
    for layer in layers(model):
        layer.router(
            "default"
        ).logit_count.zero_()  # otherwise the policy takes in its last step when it starts
    ids = torch.randint(1, 32, (2, 8))
    with torch.no_grad():
        policy = model.eval()(ids).logits
    _, trainer = train(kind, tmp_path, model, logging_strategy="steps", logging_steps=1)
    with torch.no_grad():
        model.eval().set_adapter("ref")
        torch.testing.assert_close(model(ids).logits, policy)
    first = trainer.state.log_history[0]
    if kind == "dpo":
        assert first["loss"] - first["aux_loss"] == pytest.approx(math.log(2), abs=1e-3)
    else:
        assert first["kl"] == pytest.approx(0, abs=1e-3)
