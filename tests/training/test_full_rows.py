"""Masks of training steps: made without the host reading a tensor's values, and left out where nothing is padded."""

import traceback

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from graphlora.training import Recipe, train, trainer_setup
from graphlora.training.arguments import training_arguments
from graphlora.training.full_rows import NoFullMask, masks_without_waiting
from graphlora.training.trainer import AdapterTrainer
from graphlora.training.trainer_setup import collator
from graphlora.tuner.masks import every_token, is_every_token, token_masks

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique"}


class HostReads(TorchDispatchMode):
    """Where the host asks for values of a tensor, for which it would wait on a GPU.

    Copies between devices cannot be seen on a CPU: `test_the_host_never_waits_for_a_gpu` sees those.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function._schema.name == "aten::index" else ()
        if function._schema.name in READS or any(i is not None and i.dtype == torch.bool for i in indices):
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
    with HostReads() as reads:
        batch["input_ids"][batch["attention_mask"] == 1]
    assert len(reads.found) == 1


@pytest.mark.parametrize("lengths", [(24, 24), (24, 9)])
def test_a_model_that_looks_both_ways(lengths):
    """Its masks have a shortcut of their own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()
    batch = batch_of(lengths)
    expected = model(**batch).loss
    masks = [batch["attention_mask"]] + [every_token(batch["input_ids"])] * (min(lengths) == 24)
    with masks_without_waiting(), HostReads() as reads:
        losses = [model(**batch | {"attention_mask": mask}).loss for mask in masks]
    assert reads.found == []
    for loss in losses:
        torch.testing.assert_close(loss, expected)


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
    assert not is_every_token(torch.ones(5).expand(2, 5)) and not is_every_token(
        torch.ones(2, 1).expand(2, 5)
    )
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
def test_the_forwards_of_a_run_read_nothing(any_recipe, monkeypatch, step_mode, packing):
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


def masks_of_a_run(recipe, monkeypatch):
    """The attention mask of each training batch as the model gets it, and whether its rows are all of one length."""
    seen = []
    whole = AdapterTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        if self.model.training:
            full = inputs["input_ids"].ne(self.tokenizer.pad_token_id).all().item()
            seen.append((inputs.get("attention_mask"), full))
        return whole(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", watched)
    options = {"eval_strategy": "no", "per_device_train_batch_size": 2}
    train(Recipe.from_dict(recipe | options))
    assert {full for _, full in seen} == {True, False}
    return seen


def test_runs_with_attention_of_their_own_keep_their_masks(tiny_recipe, monkeypatch):
    seen = masks_of_a_run(tiny_recipe | {"attn_implementation": "eager"}, monkeypatch)
    assert all(mask is not None and not is_every_token(mask) for mask, _ in seen)


def test_others_leave_out_those_of_full_rows(tiny_recipe, monkeypatch):
    assert all(is_every_token(mask) == full for mask, full in masks_of_a_run(tiny_recipe, monkeypatch))


def test_joined_rows_get_no_mask(tiny_recipe, monkeypatch):
    """Their borders are known by `position_ids` alone, which a mask would hide from the model."""
    monkeypatch.setattr(trainer_setup, "_layout", lambda *_: None)
    seen = []
    whole = AdapterTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        seen.append((self, self.model.training, dict(inputs)))
        return whole(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", watched)
    train(Recipe.from_dict(tiny_recipe | {"packing": True, "max_steps": 2, "eval_steps": 1}))
    assert {training for _, training, _ in seen} == {True, False}
    assert all("attention_mask" not in inputs and "position_ids" in inputs for _, _, inputs in seen)
    trainer, _, inputs = seen[0]
    assert "attention_mask" not in trainer._prepare_inputs(inputs), "after training"
    assert "attention_mask" in trainer._prepare_inputs({"input_ids": inputs["input_ids"]})


@pytest.mark.parametrize("mode", ["eager", "compile", "graph", "compiled_graph"])
def test_recorded_steps_keep_all_masks(tiny_recipe, mode):
    recipe = Recipe.from_dict(tiny_recipe)
    model = get_peft_model(model_of(), LoraConfig(target_modules=["q_proj"]))
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    arguments = training_arguments(recipe, torch.float32)
    rows = [{"input_ids": [1] * 32, "labels": [1] * 32}] * 2
    assert ("attention_mask" in collator(recipe, model, tokenizer, mode, arguments)(rows)) == (
        "graph" in mode
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("step_mode", ["eager", "graph", "compile"])
@pytest.mark.parametrize("rows", ["padded", "packed", "streamed"])
def test_the_host_never_waits_for_a_gpu(any_recipe, monkeypatch, step_mode, rows):
    """From the beginning of a step to that of the one after the next: batches, optimizer and all."""
    whole, watched = AdapterTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        step = self.state.global_step
        torch.cuda.set_sync_debug_mode("error" if 6 <= step < 9 else "default")
        watched.append(step)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)
    options = {
        "step_mode": step_mode, "packing": rows == "packed", "streaming": rows == "streamed", "eval_strategy": "no",
        "max_steps": 10, "save_steps": 10, "logging_steps": 100, "training_args": {"disable_tqdm": True},
    }  # fmt: skip
    try:
        train(Recipe.from_dict(any_recipe | options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert max(watched) == 9
