"""Logits at the answers alone give the loss and the gradients of logits everywhere."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graphlora import GraphLoraConfig
from graphlora.training.data import IGNORED, AnswerLogits, packing_collator, takes_answer_logits

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11, 12], "labels": [IGNORED] * 6 + [11, 12]},
    {"input_ids": [15, 16, 17, 18, 19, 3], "labels": [IGNORED] * 5 + [3]},
]


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": IGNORED}
    batch = {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return batch | {"attention_mask": (torch.arange(width) < lengths).long()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    return peft.get_peft_model(base, GraphLoraConfig(task_type="CAUSAL_LM", num_experts=4, r=2)).train()


@pytest.mark.parametrize("collate", [pad, packing_collator()], ids=["padded", "packed"])
@pytest.mark.parametrize("total", [None, 6])
def test_same_loss_and_gradients(model, collate, total):
    assert takes_answer_logits(model.get_base_model())
    found = []
    for batch in (dict(collate(ROWS)), AnswerLogits(collate)(ROWS)):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        out = model(**batch, num_items_in_batch=None if total is None else torch.tensor(total))
        model.zero_grad()
        out.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.loss.detach(), out.logits.shape[1], grads))
        model.load_state_dict(state)
    (loss, positions, grads), (fewer_loss, fewer_positions, fewer_grads) = found
    assert fewer_positions == 3 < positions
    assert torch.allclose(loss, fewer_loss, atol=1e-6)
    for name, grad in grads.items():
        assert torch.allclose(grad, fewer_grads[name], atol=1e-6), name


def test_a_loss_on_everything_keeps_all_logits():
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}]
    assert "logits_to_keep" not in AnswerLogits(pad)(rows)
