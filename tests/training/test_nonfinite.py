"""Steps that are not finite: nothing they touch is kept, batch and layer are named, on both ways to find them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, train
from graphlora.training.nonfinite import NonFiniteError, NonFiniteGuard
from graphlora.training.trainer import AdapterTrainer

BAD_STEP = 4
GRAPHLORA = {"num_experts": 4, "top_k": 2, "router_hidden_size": 16}


@pytest.fixture
def recipe(tiny_recipe) -> dict:
    return tiny_recipe | {"method": "graphlora", **GRAPHLORA, "load_window": "ema", "eval_strategy": "no"}


@pytest.fixture
def spoiled_layer(monkeypatch):
    """Layer 1's FFN gives one row of one step's first micro-batch values that are not numbers; also in a rerun."""
    original = AdapterTrainer.compute_loss
    first = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        ids = inputs["input_ids"]
        if self.state.global_step == BAD_STEP - 1 and not first:
            first.append(ids.clone())
        spoils = bool(first) and ids.shape == first[0].shape and torch.equal(ids, first[0])
        block = self.accelerator.unwrap_model(self.model).get_submodule("base_model.model.model.layers.1.mlp")

        def spoil(module, args, output):
            return torch.cat([output[:2], output[2:3] * float("nan"), output[3:]])

        handle = block.register_forward_hook(spoil, prepend=True) if spoils else None
        try:
            return original(self, model, inputs, *args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)


@pytest.fixture(params=[True, False], ids=["host", "device"])
def waits(request, monkeypatch, recipe) -> bool:
    """The CPU's way, and the GPU's, where the fused optimizer reads the flag and the host looks a step later."""
    original = NonFiniteGuard.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs, waits=request.param)

    monkeypatch.setattr(NonFiniteGuard, "__init__", __init__)
    recipe["optim"] = "adamw_torch" if request.param else "adamw_torch_fused"
    return request.param


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Weights, buffers and the optimizer's state."""
    model, optimizer = trainer.model, trainer.optimizer.optimizer
    found = {f"model {name}": t.clone() for name, t in model.state_dict().items() if "lora" in name}
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer {number} {name}": t.clone() for name, t in state.items()}
    return found


@pytest.fixture
def states(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What training keeps before each step's first micro-batch."""
    found: list[dict[str, torch.Tensor]] = []
    original = AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        if len(found) == self.state.global_step:
            found.append(state_of(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)
    return found


WHERE = r"first in the output of model\.layers\.1\.mlp, row\(s\) \d+ \('Question: What color is the \w+ \d+\?"


def test_a_run_stops_and_names_layer_and_row(recipe, waits, spoiled_layer, states):
    del waits
    with pytest.raises(GraphLoraError, match=rf"the loss is nan at step {BAD_STEP}; {WHERE}") as raised:
        train(Recipe.from_dict(recipe))
    assert "on_nonfinite skip" in str(raised.value)
    assert str(raised.value).count("Question:") == 1
    assert len(states) in (BAD_STEP, BAD_STEP + 1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_left_out_changes_nothing_that_training_keeps(
    recipe, waits, spoiled_layer, states, capfd, accumulation
):
    del waits
    options = {"on_nonfinite": "skip", "gradient_accumulation_steps": accumulation}
    result = train(Recipe.from_dict(recipe | options))
    line = next(line for line in capfd.readouterr().err.splitlines() if "left out" in line)
    assert re.search(rf"{WHERE}.*step left out \(1 of at most 10\)", line), line
    before, after, later = states[BAD_STEP - 1], states[BAD_STEP], states[BAD_STEP + 1]
    assert len(before) > 40
    assert before.keys() == after.keys()
    assert not [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert sum(not torch.equal(value, later[name]) for name, value in after.items()) > 30
    assert all(torch.isfinite(value).all() for value in later.values())
    assert result.metrics["steps"] == 6
    assert result.history[-2]["skipped_steps"] == 1
    assert 0 < result.metrics["train_loss"] < 10


def test_too_many_steps_left_out_end_the_run(recipe, waits, monkeypatch):
    del waits
    original = AdapterTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("inf") if self.state.global_step >= 2 else loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)
    options = {"on_nonfinite": "skip", "max_skipped_steps": 2, "max_steps": 12}
    with pytest.raises(GraphLoraError, match=r"at step 5; .* 2 step\(s\) were left out before, which is max"):
        train(Recipe.from_dict(recipe | options))


def test_a_gradient_that_is_not_finite_beside_a_finite_loss(recipe, waits, monkeypatch):
    del waits
    original = AdapterTrainer.compute_loss

    first = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step == BAD_STEP - 1 and not first:
            first.append(inputs["input_ids"].clone())
        loss = original(self, model, inputs, *args, **kwargs)
        if not first or not torch.equal(first[0], inputs["input_ids"]):
            return loss
        # A square root has an infinite slope at zero.
        return loss + 0 * torch.sqrt(0 * loss)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)
    with pytest.raises(
        GraphLoraError, match=r"the gradient's norm is nan at step 4; first in the gradient at"
    ):
        train(Recipe.from_dict(recipe))


@pytest.fixture
def broken_embedding(recipe, tiny_model, choices_file, tmp_path) -> dict:
    """A base model in which one weight is infinite, of a token that one row has. Nothing is patched."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(tiny_model).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    vocabulary = json.loads((broken / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][vocabulary["~"], 3] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in choices_file.read_text().splitlines()]
    rows[11] |= {"question": "What color is ~?", "id": "the tilde"}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "validation.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return recipe | {"model": str(broken), "task": str(tmp_path), "num_train_epochs": 2, "max_steps": -1}


TILDE = r"first in the output of model\.embed_tokens, whose weights are not finite, row\(s\) the tilde \('Que"


def test_a_token_whose_embedding_is_broken_is_found_in_the_data(broken_embedding):
    with pytest.raises(NonFiniteError, match=TILDE):
        train(Recipe.from_dict(broken_embedding))


@pytest.mark.weekly
def test_two_processes_leave_the_same_steps_out(broken_embedding, tmp_path):
    """Whichever of them gets the row; the other one's loss is spoiled too, by the loads of both."""
    options = broken_embedding | {"on_nonfinite": "skip", "per_device_train_batch_size": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_dict(options).to_yaml())
    script = Path(__file__).parents[1] / "support" / "spoiled_ranks.py"
    launch = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launch, str(script), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if "left out" in line]
    assert len(lines) == 2, lines
    assert all(re.search(TILDE, line) for line in lines), lines
    assert "alike True finite True" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"optim": "adamw_torch"}, {"step_mode": "graph"}, {"fp16": True}], ids=str
)
def test_on_a_gpu_a_step_left_out_changes_nothing(broken_embedding, states, capfd, options):
    """The fused optimizer reads the flag; another one makes the host wait; recorded steps; a loss scaler."""
    given = {"on_nonfinite": "skip", "training_args": {"disable_tqdm": True}, "lora_dropout": 0.0, **options}
    result = train(Recipe.from_dict(broken_embedding | given))
    line = next(line for line in capfd.readouterr().err.splitlines() if "left out" in line)
    assert re.search(TILDE, line), line
    step = int(re.search(r"at step (\d+)", line)[1])
    before, after = states[step - 1], states[step]
    assert not [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert result.metrics["steps"] == 20


@pytest.mark.gpu
def test_on_a_gpu_a_run_stops_with_layer_and_row(broken_embedding):
    with pytest.raises(NonFiniteError, match=TILDE):
        train(Recipe.from_dict(broken_embedding | {"training_args": {"disable_tqdm": True}}))


@pytest.mark.gpu
def test_on_a_gpu_a_step_does_not_wait_for_the_device(recipe):
    """Between log lines, nothing of the guard reads a value: PyTorch would raise."""
    options = {"training_args": {"disable_tqdm": True}, "logging_steps": 100, "max_steps": 12}
    original = NonFiniteGuard.decide

    def decide(self, norm):
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(self, norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NonFiniteGuard, "decide", decide)
        assert train(Recipe.from_dict(recipe | options)).metrics["steps"] == 12
