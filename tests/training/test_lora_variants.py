"""LoRA and its variants, PEFT's and the optimizer's, asked for by a recipe: formula, training, files, generation."""

import pytest
import torch
from peft import PeftModel
from tiny_llama import make_base, make_batch, wake
from transformers import TrainingArguments

from graphlora.training.adapting import add_adapter
from graphlora.training.loading import load_base_model, load_tokenizer
from graphlora.training.recipe import Recipe
from graphlora.training.run_data import load_data
from graphlora.training.trainer import AdapterTrainer
from graphlora.training.trainer_setup import make_trainer

R, ALPHA = 4, 6.0
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora_and_rslora": {"use_dora": True, "use_rslora": True},
    "loraplus": {"loraplus_lr_ratio": 4.0},
}


def adapted(**options):
    torch.manual_seed(0)
    recipe = Recipe(model="m", task="quiz", output_dir="o", method="lora", r=R, lora_alpha=ALPHA, **options)
    return add_adapter(make_base(), recipe).eval()


def optimizer_of(model, place, loraplus_lr_ratio=None, **_):
    """AdamW as the trainer makes it: LoRA+ is in no weight, only in the rates."""
    arguments = TrainingArguments(str(place), learning_rate=2e-2, use_cpu=True, report_to="none")
    trainer = AdapterTrainer(
        model, arguments, tokenizer=None, validation={}, loraplus_lr_ratio=loraplus_lr_ratio
    )
    return trainer.create_optimizer()


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_computes_the_formula(variant):
    """LoRA: `(W + s B A) x`, s = alpha / r, or alpha / sqrt(r) in rsLoRA; DoRA: rows rescaled to the norms of W."""
    options = VARIANTS[variant]
    model = adapted(**options)
    wake(model)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling = ALPHA / (R**0.5 if options.get("use_rslora") else R)
    W = layer.base_layer.weight
    updated = W + scaling * B @ A
    if options.get("use_dora"):
        updated = W.norm(dim=1, keepdim=True) / updated.norm(dim=1, keepdim=True) * updated
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ updated.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_saves_loads_generates_and_can_be_disabled(variant, tmp_path):
    batch = make_batch([5, 8, 3])
    expected = logits(make_base().eval(), batch)
    model = adapted(**VARIANTS[variant])
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    optimizer = optimizer_of(model.train(), tmp_path / "trainer", **VARIANTS[variant])
    assert len({group["lr"] for group in optimizer.param_groups}) == (2 if variant == "loraplus" else 1)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, adapter_name="again").eval()
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch))
    prompt = {"input_ids": batch["input_ids"][1:2], "attention_mask": batch["attention_mask"][1:2]}
    made = [m.generate(**prompt, max_new_tokens=4, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*made)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)


def test_loraplus_moves_b_by_its_ratio(tiny_recipe):
    """Adam's first step is as long as the rate, whatever the gradient; A has no gradient yet, since B is zero."""

    def stepped(ratio):
        recipe = Recipe.from_dict(
            tiny_recipe
            | {"max_steps": 1, "warmup_ratio": 0.0, "eval_strategy": "no", "loraplus_lr_ratio": ratio}
        )
        tokenizer = load_tokenizer(recipe.model)
        model = add_adapter(load_base_model(recipe.model, torch.float32), recipe)
        make_trainer(recipe, model, tokenizer, load_data(recipe, tokenizer), torch.float32).train()
        return {name: weight for name, weight in model.named_parameters() if "lora_B" in name}

    torch.manual_seed(0)
    plain = stepped(None)
    torch.manual_seed(0)
    for name, weight in stepped(4.0).items():
        assert plain[name].any(), name
        torch.testing.assert_close(weight, 4 * plain[name], rtol=1e-3, atol=1e-6, msg=name)
