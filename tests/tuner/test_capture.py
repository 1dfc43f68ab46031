"""A training step asks nothing of the device: no value is read on the host, and no host list becomes a tensor."""

import pytest
import torch
from host_reads import Calls
from tiny_llama import assert_same, gradients, layers, make_base, make_batch, make_model
from transformers.models.llama import modeling_llama

from graphlora.ops.expert_ffn import torch as torch_path
from graphlora.ops.expert_ffn.pairs import PairsBySlot

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="kernels run on CPU tensors in Triton's interpreter, which is off beside a GPU",
)


@pytest.fixture
def by_slot(monkeypatch):
    """The order of other devices than the CPU. `one_hot` reads its input on the CPU alone."""
    monkeypatch.setattr(
        torch_path, "order_pairs", lambda index, n, r, _, dtype: PairsBySlot(index, n, r, dtype)
    )
    monkeypatch.setattr(
        torch.nn.functional, "one_hot", lambda index, n: (index[..., None] == torch.arange(n)).long()
    )


@pytest.fixture
def no_masks(monkeypatch):
    """transformers' own masks ask the device for padding or make a tensor of a number, as its version goes."""
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *_, **__: None)


def model_with(backend="torch", **options):
    base = make_base(use_cache=False, num_hidden_layers=1)
    return make_model(base=base, backend=backend, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.1},
        {"edge_init": "learned", "edge_density_loss_coef": 0.1, "router_conv": "sage"},
        {"router_type": "linear", "expert_granularity": "linear", "router_aux_loss_coef": 0.1},
        {"router_conv": "gat", "norm_load_weights": False, "load_window": "cumulative"},
        pytest.param({"backend": "triton", "lora_dropout": 0.1}, marks=INTERPRETED),
    ],
    ids=["gcn", "learned", "linear", "gat", "triton"],
)
def test_nothing_is_read_on_the_host(by_slot, no_masks, options):
    model = model_with(**options)
    batch = {**make_batch([3, 4]), "num_items_in_batch": torch.tensor(5)}
    for _ in range(2):  # the second forward finds an optimizer step behind it
        with Calls() as calls:
            model(**batch).loss.backward()
        assert not calls.waits()
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_read_would_be_seen(by_slot):
    rate = layers(model_with())[0].coordination("default").poisson_rate
    with Calls() as calls:
        assert rate.item() > 0
        assert len(torch.tensor([1.0, 2.0])[torch.ones(2) > 0]) == 2
    assert calls.waits() == ["aten._local_scalar_dense.default", "aten.lift_fresh.default", "nonzero"]


def test_begin_step_does_what_the_next_forward_would(monkeypatch):
    """A replayed forward runs no Python: whoever replays it begins the step."""
    from graphlora.tuner import model as module

    def train(captured):
        model, batch = make_model(), make_batch([6, 9, 4])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        monkeypatch.setattr(module, "_is_capturing", lambda: captured)
        for _ in range(3):
            if captured:
                model.base_model.begin_step()
                model.base_model.begin_step()
            model(**batch).loss.backward()
            optimizer.step()
        return {**gradients(model), **dict(model.named_buffers())}

    assert_same(train(False), train(True), 0.0)
    model, batch = make_model(), make_batch([6, 9, 4])
    model(**batch).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    before = layers(model)[0].router("default").logit_offset.clone()
    model(**batch)  # captured: the routers must not move
    assert torch.equal(before, layers(model)[0].router("default").logit_offset)


def test_centering_of_all_blocks_costs_the_same_as_of_one():
    counts = []
    for blocks in (1, 4):
        model = make_model(base=make_base(num_hidden_layers=blocks))
        with Calls() as calls:
            model.base_model.begin_step()
        counts.append(len(calls.names))
    assert counts[0] == counts[1] <= 24


def test_no_tensor_is_printed_on_the_way(monkeypatch):
    """Calling an operator without naming its overload prints all arguments where the first overload does not fit."""

    def fail(*_args, **_kwargs):
        raise AssertionError("a tensor was printed, which reads it on the host")

    model, batch = make_model(), make_batch([6, 9, 4])
    monkeypatch.setattr(torch.Tensor, "__repr__", fail)
    for _ in range(2):
        model(**batch).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_is_captured_as_a_cuda_graph(backend):
    model = make_model(backend=backend, lora_dropout=0.0).cuda()
    batch = {name: t.cuda() for name, t in make_batch([6, 9, 4]).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(**batch).loss.backward()
    torch.cuda.current_stream().wait_stream(stream)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def start_again():
        model.zero_grad(set_to_none=False)
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])

    start_again()
    model(**batch).loss.backward()
    expected = gradients(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(**batch).loss.backward()
    for _ in range(2):
        start_again()
        graph.replay()
        assert_same(expected, gradients(model), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_kernel_makes_the_host_wait(backend):
    """A block by itself: transformers' own masks make the host wait."""
    model = make_model(backend=backend, lora_dropout=0.1).cuda()
    block = model.get_base_model().model.layers[0].mlp
    x = torch.randn(3, 9, 16, device="cuda", requires_grad=True)
    block(x).sum().backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        block(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None
