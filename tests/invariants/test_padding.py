"""Padding tokens count nowhere: padding a batch further changes no loss, load or gradient."""

import pytest
import torch
from tiny_llama import adapter_state, assert_same, gradients, loads, make_batch, make_model

LENGTHS = [7, 4, 5]


def run(width: int | None, side: str, **config):
    model = make_model(**config)
    batch = make_batch(LENGTHS, width, side)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = model(**batch)
    out.loss.backward()
    real = batch["attention_mask"].bool()
    values = {
        "loss": out.loss.detach(),
        "aux_loss": out.aux_loss.detach(),
        "loads": loads(model),
        **{name: value for name, value in adapter_state(model).items() if name.endswith("logit_count")},
    }
    sums = {name: value for name, value in adapter_state(model).items() if name.endswith("logit_sum")}
    return values, {"logits": out.logits[real].detach(), **sums, **gradients(model)}


@pytest.mark.parametrize(
    "config", [{}, {"preset": "paper", "edges": [[0, 1], [1, 2]]}, {"load_window": "batch"}]
)
@pytest.mark.parametrize(("width", "side"), [(16, "right"), (16, "left"), (40, "left")])
def test_padding_further_changes_nothing(width, side, config):
    tight, padded = run(None, "right", **config), run(width, side, **config)
    assert_same(tight[0], padded[0], 1e-6)
    assert_same(tight[1], padded[1], 5e-6)


def test_an_all_padding_row_changes_nothing():
    def run_rows(lengths):
        model = make_model()
        batch = make_batch(lengths)
        out = model(**batch)
        out.loss.backward()
        return {"aux": out.aux_loss.detach(), "loads": loads(model), **gradients(model)}

    assert_same(run_rows([5, 3]), run_rows([5, 3, 0]), 5e-6)


def test_without_a_mask_padding_would_count():
    """The comparison above can fail."""
    model = make_model()
    batch = make_batch(LENGTHS, 16)
    with_mask = model(**batch).aux_loss
    del batch["attention_mask"]
    assert not torch.isclose(make_model()(**batch).aux_loss, with_mask, rtol=1e-3)
