"""The order of the experts carries no meaning: permuting them, graph and loads included, changes nothing."""

import pytest
import torch
from tiny_llama import assert_same, gradients, layers, loads, make_batch, make_model

ORDER = torch.tensor([2, 0, 3, 1])
PER_EXPERT = ("cumulative_weights", "logit_offset", "logit_sum", "expert_features")


def permute(model):
    """Expert i becomes what expert ORDER[i] was."""
    with torch.no_grad():
        for layer in layers(model):
            for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                per_expert = ("_proj.default.lora" in name and "graphlora_" in name) or name.endswith(
                    PER_EXPERT
                )
                if per_expert or name.endswith("router.default.weight"):
                    tensor.copy_(tensor[ORDER])
                elif name.endswith("adjacency"):
                    tensor.copy_(tensor[ORDER][:, ORDER])


@pytest.mark.parametrize(
    "config",
    [
        {"edges": [[0, 1], [1, 2]]},
        {"router_type": "linear"},
        {"preset": "paper", "edges": [[0, 1], [2, 3], [1, 2]], "router_input_gain": 4.0},
        {"router_conv": "sage", "edges": [[0, 3]]},
        {"router_conv": "gat", "edges": [[0, 1], [1, 2]]},
        {"expert_granularity": "linear", "edges": [[0, 1]], "backend": "eager"},
        {"edges": [[0, 1]], "backend": "eager"},
    ],
    ids=str,
)
def test_outputs_losses_and_loads_do_not_change(config):
    results = []
    for permuted in (False, True):
        model = make_model(**config)
        model(**make_batch([4, 4], seed=1))
        if permuted:
            permute(model)
        out = model(**make_batch([6, 3]))
        out.loss.backward()
        order = torch.argsort(ORDER) if permuted else torch.arange(4)
        shared = {
            n: g for n, g in gradients(model).items() if "conv_weight" in n or "bias" in n or "attn" in n
        }
        results.append(
            {
                "logits": out.logits.detach(),
                "loss": out.loss.detach(),
                "aux_loss": out.aux_loss.detach(),
                "loads": loads(model)[:, order],
                "router_logits": out.router_logits[1].detach()[:, order],
                **shared,
            }
        )
    assert_same(*results, 1e-5)


def test_permuting_weights_without_the_graph_does_change_them():
    """The comparison above can fail."""
    logits = []
    for graph_too in (False, True):
        model = make_model(edges=[[0, 1], [1, 2]])
        graph = layers(model)[0].router("default").adjacency.clone()
        permute(model)
        if not graph_too:
            for layer in layers(model):
                layer.router("default").adjacency.copy_(graph)
        logits.append(model(**make_batch([6, 3])).logits)
    assert not torch.allclose(*logits, atol=1e-3)
