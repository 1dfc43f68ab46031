"""Steps in other modes: what they change stays with the candidate that asked for it."""

import pytest
import torch
from benchmarks.candidates.models import model_config, random_tokens
from benchmarks.candidates.modes import call_in_mode, candidate_in_mode, is_recorded, split_mode
from benchmarks.failures import NotHere
from benchmarks.shapes import TINY
from transformers.models.llama import modeling_llama

from graphlora.benchmark.random_model import random_model
from graphlora.benchmark.timing import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def base():
    return random_model(model_config(TINY, 2), CPU, torch.float32)


@pytest.fixture
def ids():
    return random_tokens(TINY, 2, 16, CPU)


def grads(candidate, ids):
    candidate.forward_backward(ids)
    return [p.grad.clone() for p in candidate.trained]


def test_names():
    assert split_mode("peft_float32_dropout_r16_graph") == ("peft_float32_dropout_r16", "graph")
    assert split_mode("triton_r16") == ("triton_r16", None)
    assert split_mode("frozen") == ("frozen", None)


# Dynamo of torch 2.13 makes an instance of the function it traces, and looks at the gradients of inputs.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("mode", ["compiled", "whole"])
def test_a_mode_gives_the_same_gradients(base, ids, mode):
    torch.manual_seed(0)
    plain = grads(candidate_in_mode("torch_r8", base, CPU), ids)
    torch.manual_seed(0)
    other = grads(candidate_in_mode(f"torch_r8_{mode}", base, CPU), ids)
    for value, want in zip(other, plain, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["torch_r8_graph", "torch_r8_compiledgraph"])
def test_a_recorded_step_trains(base, ids, name):
    assert is_recorded(name)
    candidate = candidate_in_mode(name, base, CPU)
    before = [p.detach().clone() for p in candidate.trained]
    call_in_mode(name, candidate, ids, CPU)(Stopwatch(CPU))
    assert any(not torch.equal(p, old) for p, old in zip(candidate.trained, before, strict=True))


def test_ligers_kernels_need_a_gpu(base):
    with pytest.raises(NotHere):
        candidate_in_mode("torch_r8_ligers", base, CPU)


def test_ligers_kernels_stay_with_their_candidate(base):
    """They cannot run here, but what Liger exchanges can be seen."""
    pytest.importorskip("liger_kernel")
    rotary, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    candidate = candidate_in_mode("torch_r8_ligers", base, torch.device("cuda"))
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm) == (rotary, norm)
    with candidate.around():
        assert "liger" in modeling_llama.apply_rotary_pos_emb.__module__
    assert modeling_llama.apply_rotary_pos_emb is rotary
    layer = candidate.model.get_base_model().model.layers[0]
    assert "liger" in layer.input_layernorm.forward.__func__.__module__
    assert type(base.model.layers[0].input_layernorm) is norm
    assert "forward" not in vars(base.model.layers[0].input_layernorm)
