"""SmolLM2-135M itself: an untouched adapter changes nothing, and generation is the base model's.

In float64: over 30 layers the roundings of float32 alone add up to about 1e-6 of the logits.
"""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphlora import GraphLoraConfig

pytestmark = pytest.mark.real_model
PROMPTS = ["The capital of France is", "Question: What is the chemical symbol for gold?\nAnswer:"]


def test_an_untouched_adapter_reproduces_the_real_model(real_model):
    tokenizer = AutoTokenizer.from_pretrained(real_model, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float64).eval()
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        expected, said = base(**batch).logits, base.generate(**batch, **options)
        model = get_peft_model(base, GraphLoraConfig(task_type="CAUSAL_LM")).eval()
        out = model(**batch)
        keep = batch["attention_mask"].bool()
        error = (out.logits - expected)[keep].norm() / expected[keep].norm()
        assert error < 1e-6
        assert len(out.router_logits) == 30
        assert torch.equal(model.generate(**batch, **options), said)
