"""Liger's loss: chosen where it can be, refused where not, and equal to transformers' own with the aux loss joined."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, loss_kernel
from graphlora.training.loss_kernel import FUSED_LOSS, liger_options

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")


def recipe(kernel: str) -> Recipe:
    return Recipe.from_dict({"model": "m", "task": "quiz", "output_dir": "out", "loss_kernel": kernel})


@needs_liger
@pytest.mark.parametrize("kernel", ["auto", "liger"])
def test_the_fused_loss_alone_is_switched_on(kernel, monkeypatch):
    monkeypatch.setattr(loss_kernel, "AUTO_TAKES_LIGER", True)
    options = liger_options(recipe(kernel), "llama", GPU, "eager")
    assert {name for name, on in options.items() if on} == {FUSED_LOSS}
    assert {"rope", "rms_norm", "swiglu", "cross_entropy"} <= set(options)


@needs_liger
@pytest.mark.parametrize(
    ("model_type", "device", "mode", "reason"),
    [
        ("gpt2", GPU, "eager", "no loss for models of type gpt2"),
        ("llama", CPU, "eager", "its kernels need a GPU, not cpu"),
        ("llama", GPU, "graph", "a step of mode graph"),
        ("llama", GPU, "compile", "a step of mode compile"),
    ],
)
def test_elsewhere_auto_does_without_and_the_wish_is_refused(model_type, device, mode, reason):
    assert liger_options(recipe("auto"), model_type, device, mode) is None
    with pytest.raises(GraphLoraError, match=rf"loss_kernel is liger, but .*{reason}.*; or set loss_kernel"):
        liger_options(recipe("liger"), model_type, device, mode)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(loss_kernel, "find_spec", lambda _: None)
    assert liger_options(recipe("auto"), "llama", GPU, "eager") is None
    with pytest.raises(GraphLoraError, match="pip install liger-kernel"):
        liger_options(recipe("liger"), "llama", GPU, "eager")
    with pytest.raises(GraphLoraError, match="its kernels need a GPU, not cpu: train on one"):
        liger_options(recipe("liger"), "llama", CPU, "eager")


def test_none_means_none(monkeypatch):
    monkeypatch.setattr(loss_kernel, "AUTO_TAKES_LIGER", True)
    assert liger_options(recipe("none"), "llama", GPU, "eager") is None


def test_auto_waits_for_a_measurement():
    assert liger_options(recipe("auto"), "llama", GPU, "eager") is None


EQUALITY = """
import torch
from liger_kernel.transformers import _apply_liger_kernel_to_instance
from tiny_llama import gradients, largest_gap, make_batch, make_model
from graphlora.training.data import AnswerLogits
from graphlora.training.loss_kernel import fused_loss_options

device = "cuda" if torch.cuda.is_available() else "cpu"
batch = make_batch([9, 5], 12)
batch["labels"][:, :6] = -100
short = AnswerLogits(lambda _: batch, lambda _: 8)([])
assert "logits_to_keep" in short
for inputs in (batch, short):
    found = []
    for liger in (False, True):
        model = make_model().to(device)
        if liger:
            _apply_liger_kernel_to_instance(model=model.get_base_model(), **fused_loss_options("llama"))
        moved = {name: value.to(device) for name, value in inputs.items()}
        out = model(**moved, num_items_in_batch=torch.tensor(11, device=device))
        out.loss.backward()
        assert (out.logits is None) == liger
        found.append((out.loss.detach(), out.aux_loss.detach(), gradients(model)))
    (loss, aux, grads), (liger_loss, liger_aux, liger_grads) = found
    assert torch.equal(aux, liger_aux) and aux > 0
    assert torch.allclose(loss, liger_loss, rtol=1e-5), (loss, liger_loss)
    assert largest_gap(grads, liger_grads) < 1e-5
print("EQUAL")
"""


def run_equality(**environment: str) -> None:
    support = str(Path(__file__).parents[1] / "support")
    path = os.pathsep.join([support, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run([sys.executable, "-c", EQUALITY], capture_output=True, text=True, env=environment)
    assert "EQUAL" in done.stdout, done.stderr


@needs_liger
@pytest.mark.skipif(torch.cuda.is_available(), reason="the next test runs it on the GPU")
def test_the_fused_loss_equals_the_models_own_in_the_interpreter():
    """Triton's interpreter has to be chosen before Triton is imported, so in a process of its own."""
    run_equality(TRITON_INTERPRET="1")


@needs_liger
@pytest.mark.gpu
def test_the_fused_loss_equals_the_models_own_on_a_gpu():
    run_equality()
