"""Masks of training steps: made without the host reading a tensor's values, and left out where nothing is padded."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from graphlora.training import Recipe, train
from graphlora.training.full_rows import NoFullMask, masks_without_waiting
from graphlora.training.trainer import AdapterTrainer
from graphlora.tuner.masks import every_token, is_every_token, token_masks

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}


class HostReads(TorchDispatchMode):
    """Where the host asks for values of a tensor, for which it would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in READS:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
            self.found.append(" < ".join(f"{f.filename[-40:]}:{f.lineno}" for f in frames[-2:-6:-1]))
        return function(*args, **(kwargs or {}))


def model_of(kind="llama", **options):
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def batch_of(lengths, longest=24):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("mistral", {"sliding_window": 8})])
@pytest.mark.parametrize("lengths", [(24, 24), (24, 9)])
def test_a_step_is_the_same_and_reads_nothing(kind, options, lengths):
    model, batch = model_of(kind, **options), batch_of(lengths)
    loss, gradients = loss_and_gradients(model, batch)
    if min(lengths) == 24:
        batch["attention_mask"] = every_token(batch["input_ids"])
    with masks_without_waiting(), HostReads() as reads:
        same_loss, same_gradients = loss_and_gradients(model, batch)
    assert reads.found == []
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_gradients, gradients)


def test_transformers_itself_reads():
    """Without which the other tests could not fail."""
    model, batch = model_of(), batch_of((24, 9))
    with HostReads() as reads:
        loss_and_gradients(model, batch)
    assert reads.found


def test_what_attention_is_given(monkeypatch):
    """No mask of full rows, so that fast causal kernels can run; a mask of padded ones; elsewhere what it was."""
    seen = []
    whole = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return whole(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, batch = model_of(), batch_of((24, 24))

    def masks(mask):
        seen.clear()
        model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        return [None if m is None else tuple(m.shape) for m in seen]

    ones = torch.ones_like(batch["input_ids"])
    with masks_without_waiting():
        assert masks(every_token(ones)) == [None, None]
        assert masks(ones) == [(2, 1, 24, 24)] * 2
        with torch.no_grad():
            assert masks(ones) == [None, None]
    assert masks(ones) == [None, None]


def test_the_override_ends_and_leaves_another_one_alone():
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    @masks_without_waiting()
    def fail():
        raise KeyError(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before)

    with pytest.raises(KeyError, match="False"):
        fail()
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before
    with masks_without_waiting(on=False):
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before
    with masks_without_waiting():
        ours = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        with masks_without_waiting():
            assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is ours
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is ours
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before


def test_the_mask_of_every_token_is_known_without_its_values():
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = every_token(ids)
    assert is_every_token(mask) and mask.all() and mask.shape == ids.shape
    assert not is_every_token(torch.ones(2, 5)) and not is_every_token(mask.clone())
    assert token_masks({"input_ids": ids, "attention_mask": mask}, False) == {
        "encoder": None,
        "decoder": None,
    }


def test_the_collator_leaves_out_full_masks_alone():
    batches = [batch_of((24, 24)), batch_of((24, 23)), {"input_ids": torch.zeros(1, 3)}]
    kept = [NoFullMask(lambda _, batch=batch: batch)([]) for batch in batches]
    assert [sorted(k) for k in kept] == [
        ["input_ids", "labels"], ["attention_mask", "input_ids", "labels"], ["input_ids"]
    ]  # fmt: skip


@pytest.mark.parametrize("step_mode", ["eager", "compile"])
@pytest.mark.parametrize("packing", [False, True])
def test_forward_and_backward_of_a_run_read_nothing(any_recipe, monkeypatch, step_mode, packing):
    """Rows of one length in one batch, and of several in others."""
    seen = []
    whole = AdapterTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        with HostReads() as reads:
            result = whole(self, model, inputs, *args, **kwargs)
        seen.append((is_every_token(inputs["attention_mask"]), reads.found))
        return result

    monkeypatch.setattr(AdapterTrainer, "compute_loss", watched)
    more = {"training_args": any_recipe["training_args"] | {"torch_compile_backend": "eager"}}
    options = {
        "step_mode": step_mode,
        "packing": packing,
        "eval_strategy": "no",
        "per_device_train_batch_size": 2,
    }
    train(Recipe.from_dict(any_recipe | options | (more if step_mode == "compile" else {})))
    assert len(seen) == 6
    assert [found for _, found in seen if found] == []
    if not packing and step_mode == "eager":
        assert {full for full, _ in seen} == {True, False}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("step_mode", ["eager", "graph", "compile"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_host_never_waits_for_a_gpu(any_recipe, monkeypatch, step_mode, packing):
    """From the beginning of a step to that of the one after the next: batches, optimizer and all."""
    whole, watched = AdapterTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        step = self.state.global_step
        torch.cuda.set_sync_debug_mode("error" if 6 <= step < 9 else "default")
        watched.append(step)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)
    options = {
        "step_mode": step_mode, "packing": packing, "eval_strategy": "no", "max_steps": 10, "save_steps": 10,
        "logging_steps": 100, "training_args": {"disable_tqdm": True},
    }  # fmt: skip
    try:
        train(Recipe.from_dict(any_recipe | options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert max(watched) == 9
