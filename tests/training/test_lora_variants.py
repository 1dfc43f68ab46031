"""LoRA and the variants that PEFT has, asked for by a recipe: formula, training, files, generation."""

import pytest
import torch
from peft import PeftModel
from tiny_llama import make_base, make_batch, wake

from graphlora.training.adapting import add_adapter
from graphlora.training.recipe import Recipe

R, ALPHA = 4, 6.0
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora_and_rslora": {"use_dora": True, "use_rslora": True},
}


def adapted(**options):
    torch.manual_seed(0)
    recipe = Recipe(model="m", task="quiz", output_dir="o", method="lora", r=R, lora_alpha=ALPHA, **options)
    return add_adapter(make_base(), recipe).eval()


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
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=2e-2)
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
