"""Whole runs with recorded steps, compiled steps and a 4-bit base.

On a CPU recorded steps are run again on their buffers (`captured.Rerun`); the GPU tests record CUDA graphs.
"""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, run, train
from graphlora.training.arguments import training_arguments
from graphlora.training.interrupts import TrainingInterrupted
from graphlora.training.trainer import AdapterTrainer
from graphlora.tuner.compiled_layers import decoder_layers

# What PyTorch's own tracer does: it looks at gradients of views, and (2.11) instantiates autograd functions.
GRADS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
FUNCTIONS = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"
GPU_ARGS = {"disable_tqdm": True}


@pytest.fixture
def recorded(monkeypatch):
    """Steps on a CPU are recorded too."""
    monkeypatch.setattr(run, "resolve_step_mode", lambda *_: "graph")


def assert_equal_files(one: Path, other: Path) -> None:
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def train_in_two_parts(recipe: Recipe, stop: int, monkeypatch) -> None:
    """Interrupted in step `stop`, then resumed."""
    original, sent = AdapterTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == stop - 1 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", training_step)
        with pytest.raises(TrainingInterrupted, match="--resume"):
            train(recipe)
    train(recipe, resume=True)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_recorded_runs_learn_what_eager_ones_learn(any_recipe, monkeypatch, accumulation, packing):
    options = any_recipe | {
        "lora_dropout": 0.0,
        "gradient_accumulation_steps": accumulation,
        "packing": packing,
        "max_steps": 8,
        "eval_steps": 4,
    }
    recipe = Recipe.from_dict(options)
    eager = train(recipe)
    before = load_file(Path(recipe.output_dir) / WEIGHTS)
    monkeypatch.setattr(run, "resolve_step_mode", lambda *_: "graph")
    result = train(recipe, overwrite=True)
    assert result.metrics["step_mode"] == "graph"
    assert eager.metrics["step_mode"] == "eager"
    assert result.metrics["train_loss"] == pytest.approx(eager.metrics["train_loss"], rel=1e-4)
    after = load_file(Path(recipe.output_dir) / WEIGHTS)
    gap = sum(float((after[name] - value).norm()) for name, value in before.items())
    assert gap < 1e-2 * sum(float(value.norm()) for value in before.values())


@pytest.mark.parametrize(
    ("stop", "device"), [(4, "cpu"), (5, "cpu"), pytest.param(5, "cuda", marks=pytest.mark.gpu)]
)
def test_a_resumed_recorded_run_equals_an_uninterrupted_one(
    any_recipe, tmp_path, monkeypatch, recorded, stop, device
):
    """With dropout and accumulation: buffers, random state and shapes start anew, the result does not change."""
    options = any_recipe | {
        "max_steps": 8,
        "eval_steps": 4,
        "gradient_accumulation_steps": 2,
        "load_best_model_at_end": False,
        "save_total_limit": None,
    }
    if device == "cuda":
        options["training_args"] = GPU_ARGS
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(Recipe.from_dict(options | {"output_dir": str(whole)}))
    recipe = Recipe.from_dict(options | {"output_dir": str(parts)})
    train_in_two_parts(recipe, stop, monkeypatch)
    assert_equal_files(whole, parts)


def test_a_bad_loss_stops_a_recorded_run_too(tiny_recipe, monkeypatch, recorded):
    original = AdapterTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)
    with pytest.raises(GraphLoraError, match=r"loss is nan at step 5.*checkpoint-3"):
        train(Recipe.from_dict(tiny_recipe))


TRACED = {"torch_compile_backend": "aot_eager"}


def compiled(recipe: dict, **options) -> Recipe:
    """The recipe with compiled steps, by the tracing alone; what a compiler makes of it is its own affair."""
    arguments = recipe["training_args"] | TRACED
    return Recipe.from_dict(recipe | {"step_mode": "compile", "training_args": arguments} | options)


@GRADS
@pytest.mark.parametrize(
    ("mode", "packing"), [("compile", False), ("compile", True), ("compiled_graph", False)]
)
def test_compiled_steps_learn_what_eager_ones_learn(tiny_recipe, monkeypatch, capsys, mode, packing):
    options = tiny_recipe | {
        "lora_dropout": 0.0,
        "max_steps": 3,
        "eval_strategy": "no",
        "packing": packing,
        "per_device_train_batch_size": 48 if packing else 4,
    }
    eager = train(Recipe.from_dict(options))
    monkeypatch.setattr(run, "resolve_step_mode", lambda *_: mode)
    assert "steps are compiled" not in capsys.readouterr().err
    result = train(compiled(options), overwrite=True)
    assert capsys.readouterr().err.count("the first ones of each length of a batch take some seconds") == 1
    assert result.metrics["step_mode"] == mode
    assert result.metrics["train_loss"] == pytest.approx(eager.metrics["train_loss"], rel=1e-4)
    layers = decoder_layers(result.model)
    assert not any("forward" in vars(layer) for layer in layers)


@GRADS
def test_a_compiled_run_is_validated_and_resumed(tiny_recipe, tmp_path, monkeypatch):
    """Validation runs uncompiled; what is compiled anew after an interruption computes the same."""
    graphs, original = [], AdapterTrainer.evaluation_loop

    def evaluation_loop(self, *args, **kwargs):
        before = counters["stats"]["unique_graphs"]
        result = original(self, *args, **kwargs)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        return result

    monkeypatch.setattr(AdapterTrainer, "evaluation_loop", evaluation_loop)
    options = tiny_recipe | {"eval_steps": 2, "load_best_model_at_end": False, "save_total_limit": None}
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train(compiled(options, max_steps=4, output_dir=whole))
    recipe = compiled(options, max_steps=4, output_dir=parts)
    train_in_two_parts(recipe, 2, monkeypatch)
    assert_equal_files(Path(whole), Path(parts))
    assert len(graphs) >= 4
    assert set(graphs) == {0}


@GRADS
def test_a_bad_weight_in_a_compiled_run_is_found(tiny_recipe, monkeypatch):
    original = AdapterTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        if self.state.global_step == 2:
            layer = decoder_layers(self.accelerator.unwrap_model(model))[1]
            layer.input_layernorm.weight.data[0] = float("nan")
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)
    with pytest.raises(GraphLoraError, match=r"layers\.1\.input_layernorm, whose weights are not finite"):
        train(compiled(tiny_recipe, eval_strategy="no", load_best_model_at_end=False))


def _no_compiler(graph, inputs):
    raise RuntimeError("Failed to find C compiler\nsomewhere")


def test_a_compiler_that_is_missing_ends_a_run_that_wants_it_and_no_other(tiny_recipe, monkeypatch, capsys):
    torch._dynamo.reset()
    torch._dynamo.register_backend(_no_compiler, name="no_compiler")
    monkeypatch.setitem(TRACED, "torch_compile_backend", "no_compiler")
    options = tiny_recipe | {"max_steps": 2, "eval_strategy": "no"}
    with pytest.raises(
        GraphLoraError, match=r"step cannot be compiled \(RuntimeError: Failed to find C compiler\); set"
    ):
        train(compiled(options))
    monkeypatch.setattr(run, "resolve_step_mode", lambda *_: "compile")
    result = train(compiled(options, step_mode="auto"), overwrite=True)
    assert result.metrics["steps"] == 2
    assert capsys.readouterr().err.count("torch.compile failed") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"torch_compile_backend": "inducter"},
            "refuses training_args.torch_compile_backend inducter: Invalid backend",
        ),
        (
            {"torch_compile_mode": "fastest"},
            "refuses training_args.torch_compile_mode fastest: Unrecognized mode",
        ),
    ],
)
def test_a_compiler_that_does_not_exist_is_refused(tiny_recipe, options, reason):
    recipe = Recipe.from_dict(tiny_recipe | {"step_mode": "compile", "training_args": options})
    with pytest.raises(GraphLoraError, match=reason):
        train(recipe)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_options_of_a_compiler_that_does_not_run_are_refused(tiny_recipe, mode):
    recipe = Recipe.from_dict(tiny_recipe | {"step_mode": mode, "training_args": TRACED})
    with pytest.raises(GraphLoraError, match=rf"step_mode {mode} compiles nothing; set step_mode to compile"):
        training_arguments(recipe, torch.float32)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_base_in_four_bits_trains(any_recipe):
    options = {"load_in_4bit": True, "max_steps": 3, "eval_steps": 3}
    if any_recipe["method"] == "graphlora":
        options["router_normal_loss_coef"] = 1.0  # so that the text makes most of the loss
    result = train(Recipe.from_dict(any_recipe | options))
    assert 0 < result.metrics["train_loss"] < 10
    kinds = {type(module).__name__ for module in result.model.modules()}
    assert "Linear4bit" in kinds
    norm = result.model.get_base_model().model.norm
    assert norm.weight.dtype == torch.float32
    assert result.record.config["load_in_4bit"] is True


def test_four_bits_need_the_package_and_weights_to_quantize(tiny_recipe, monkeypatch):
    from graphlora.training import loading

    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(GraphLoraError, match=r"load_in_4bit needs bitsandbytes.*graphlora\[quantization\]"):
        train(Recipe.from_dict(tiny_recipe | {"load_in_4bit": True}))


@pytest.mark.gpu
@GRADS
@FUNCTIONS
@pytest.mark.parametrize("mode", ["graph", "compile", "compiled_graph"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_cuda_graphs_learn_what_eager_steps_learn(any_recipe, dropout, mode):
    """Ten steps with accumulation and several lengths; dropout draws the same numbers in both."""
    options = any_recipe | {
        "training_args": GPU_ARGS,
        "lora_dropout": dropout,
        "max_steps": 10,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "no",
        "warmup_ratio": 0.0,
    }
    results = [
        train(Recipe.from_dict(options | {"step_mode": how}), overwrite=True) for how in ("eager", mode)
    ]
    eager, graph = (result.metrics for result in results)
    assert graph["step_mode"] == mode
    # Padding to buckets moves the random numbers of dropout, so with it the runs are alike, not equal.
    assert graph["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3 if dropout == 0 else 0.2)
