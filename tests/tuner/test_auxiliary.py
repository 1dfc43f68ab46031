"""The losses of all blocks are computed together: few operations, equal to those of one block after the other."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_llama import layers, make_base, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from graphlora.losses import normal_balance, poisson_distinction
from graphlora.ops.backend import interprets_triton
from graphlora.router import Routing, select_experts
from graphlora.tuner import auxiliary
from graphlora.tuner.auxiliary import _groups, _in_order, _runs, _token_mean, auxiliary_loss
from graphlora.tuner.record import RoutingRecord

pytestmark = pytest.mark.filterwarnings("ignore:.*hold twins")
SUMS = [
    "torch",
    pytest.param("fused", marks=pytest.mark.skipif(not interprets_triton(), reason="no Triton interpreter")),
]
TOKENS = {"decoder": 20, "encoder": 30}
MIXED = {"num_experts_pattern": {"layers.1.mlp": 6}}


class Kernels(TorchDispatchMode):
    """Counts operations, views and empty tensors aside."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        infos = (argument.alias_info for argument in func._schema.arguments)
        is_view = any(info is not None and not info.is_write for info in infos)
        name = func.overloadpacket.__name__
        if not is_view and not name.startswith(("empty", "new_empty")):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def make_record(model, runs: int = 1, seed: int = 0) -> tuple[RoutingRecord, list[torch.Tensor]]:
    """A training record with random routing of every block, and the tensors that take its gradients."""
    generator = torch.Generator().manual_seed(seed)
    top_k = model.peft_config["default"].top_k
    record, leaves = RoutingRecord(training=True), []
    for layer in [layer for layer in layers(model) for _ in range(runs)]:
        size = layer.coordination("default").num_experts
        made = select_experts(2 * torch.randn(TOKENS[layer.side], size, generator=generator), top_k)
        probs, weights = made.router_probs.requires_grad_(), made.top_k_weights.requires_grad_()
        record.entries.append((layer, Routing(made.router_logits, probs, weights, made.top_k_index)))
        leaves += [probs, weights]
    return record, leaves


def make_masks(seed: int = 0) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return {side: torch.rand(tokens, generator=generator) > 0.3 for side, tokens in TOKENS.items()}


def use_sums(sums, monkeypatch):
    monkeypatch.setattr(auxiliary, "_has_kernel", lambda *_: sums == "fused")


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("settings", [{}, {"preset": "released"}, {"load_window": "batch"}], ids=str)
def test_operations_do_not_grow_with_the_layers(settings, sums, monkeypatch):
    """Forward and backward, in training."""
    use_sums(sums, monkeypatch)

    def launched(num_layers: int) -> Counter[str]:
        model = make_model(base=make_base(num_hidden_layers=num_layers), **settings)
        record, _ = make_record(model)
        with Kernels() as kernels:
            auxiliary_loss(record, make_masks(), "default", model.peft_config["default"]).backward()
        return kernels.names

    few, many = launched(2), launched(6)
    assert few.total() <= 200, few
    at_most_one_per_layer = few.total() + 4
    assert many.total() <= at_most_one_per_layer, many - few


def one_by_one(model, record, masks, world_size):
    """The loss, block after block, and the state that it leaves; all processes see the same tokens."""
    config = model.peft_config["default"]
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    poisson, normal = [], []
    for layer, routing in record.entries:
        block, router = layer.coordination("default"), layer.router("default")
        flags = masks[layer.side].float()
        per_token = poisson_distinction(routing.router_probs, block.poisson_rate, config.divergence)
        poisson.append((per_token * flags).sum() / flags.sum())
        given = torch.zeros_like(routing.router_probs).scatter(1, routing.top_k_index, routing.top_k_weights)
        load = world_size * (given * flags[:, None]).sum(dim=0)
        prefix = f"{layer.block_name}.graphlora_"
        found = {n: v for n, v in state.items() if prefix in n}
        history, total, count, offset = (
            next(v for n, v in found.items() if n.endswith(suffix))
            for suffix in ("cumulative_weights", "logit_sum", "logit_count", "logit_offset")
        )
        ema = config.load_decay * history + (1 - config.load_decay) * load
        seen = {"ema": ema, "batch": load, "cumulative": history + load}[config.load_window]
        normal.append(normal_balance(seen[None], block.normal_scale[None], config.divergence)[0])
        history.copy_((history + load if config.load_window == "cumulative" else ema).detach())
        total += world_size * (flags[:, None] * (routing.router_logits + offset)).sum(dim=0)
        count += world_size * flags.sum()
        assert router.centering
    loss = config.router_poisson_loss_coef * torch.stack(poisson).mean()
    return loss + config.router_normal_loss_coef * torch.stack(normal).mean(), state


def pretend_two_processes(monkeypatch):
    """Of which the other one sees the same tokens."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))


def grads_of(loss, model, leaves) -> dict[str, torch.Tensor]:
    names = {n: p for n, p in model.named_parameters() if "graphlora_coordination" in n}
    names |= {f"routing {i}": leaf for i, leaf in enumerate(leaves)}
    grads = torch.autograd.grad(loss, list(names.values()))
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"load_window": "ema"},
        {"load_window": "batch"},
        {"load_window": "cumulative"},
        {"poisson_rate_form": "clamp", "normal_scale_form": "free"},
    ],
    ids=str,
)
def test_blocks_of_unequal_shapes_get_what_they_get_alone(settings, runs, world_size, sums, monkeypatch):
    """Other numbers of experts, other sides, and blocks that run several times in a forward."""
    use_sums(sums, monkeypatch)
    model = make_model(base=make_base(num_hidden_layers=4), **MIXED, **settings)
    layers(model)[2].side = "encoder"
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers(model):
            block, router = layer.coordination("default"), layer.router("default")
            for tensor in (*block.parameters(), router.logit_offset):
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
            block.cumulative_weights.copy_(9 * torch.rand(block.num_experts, generator=generator))
    record, leaves = make_record(model, runs)
    expected, state = one_by_one(model, record, make_masks(), world_size)
    expected_grads = grads_of(expected, model, leaves)
    if world_size == 2:
        pretend_two_processes(monkeypatch)
    addresses = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    loss = auxiliary_loss(record, make_masks(), "default", model.peft_config["default"])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    for name, grad in grads_of(loss, model, leaves).items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-5, atol=1e-7, msg=name)
    for name, buffer in model.named_buffers():
        assert buffer.data_ptr() == addresses[name], name
        torch.testing.assert_close(buffer, state[name], rtol=1e-6, atol=1e-5, msg=name)


def test_the_mean_of_no_token_is_zero():
    """A process whose rows are all padding still takes part."""
    assert _token_mean(torch.zeros(2, 0), None).tolist() == [0, 0]
    assert _token_mean(torch.ones(2, 3), torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0]
    means = _token_mean(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([True, True, False]))
    assert means.tolist() == [1.5]


def test_values_of_groups_come_back_in_the_order_of_the_blocks():
    sizes = (4, 6, 4, 5, 6)
    entries = [
        (
            SimpleNamespace(side="decoder"),
            SimpleNamespace(router_probs=torch.full((3, size), float(block))),
            None,
        )
        for block, size in enumerate(sizes)
    ]
    groups = list(_groups(entries).values())
    assert [len(group) for group in groups] == [2, 2, 1]
    per_group = [torch.stack([r.router_probs[0, 0] for _, r, _ in group]) for group in groups]
    assert [value.item() for value in _in_order(entries, groups, per_group)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_no_block_is_twice_among_those_whose_state_moves_at_once():
    entries = [(block, None, None) for block in "aabccc"]
    assert _runs(entries) == [[0, 2, 3], [1, 4], [5]]
