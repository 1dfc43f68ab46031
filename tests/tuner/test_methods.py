"""Every method of the comparison: its formula, training, files, generation, and what it must not change."""

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_llama import make_base, make_batch, wake
from torch.nn import functional as F

from graphlora import GraphLoraConfig
from graphlora.errors import GraphLoraError
from graphlora.tuner.layer import GraphLoraLayer, GraphLoraLinear
from graphlora.tuner.presets import PRESETS
from graphlora.tuner.projection import GraphLoraProjection

# Without a self term two experts with the same neighbors cannot be told apart, which the adapter says.
pytestmark = pytest.mark.filterwarnings("ignore:.*expert graphs hold twins")
GRAPH = ("graphlora", "paper", "released")
PER_PROJECTION = [name for name in PRESETS if name not in (*GRAPH, "mixlora")]
EVERYWHERE = ("mola", "ld_mole")  # on attention too
VARIANTS = {
    **{name: {"preset": name} for name in PRESETS},
    "loramoe_without_constraint": {"preset": "loramoe", "router_aux_loss_coef": 0.0},
    "mola_with_balance": {"preset": "mola", "router_aux_loss_coef": 0.001},
    "ld_mole_with_sparsity": {"preset": "ld_mole", "router_sparsity_loss_coef": 0.1},
    "without_graph": {"router_type": "linear"},
    "without_poisson": {"router_poisson_loss_coef": 0},
    "without_normal": {"router_normal_loss_coef": 0},
    **{edges: {"edge_init": edges} for edges in ("none", "ring", "complete", "learned")},
    "dense_edges": {"edge_init": "random", "edge_density": 0.5},
}
SMALL = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "router_hidden_size": 8}


@pytest.fixture
def make():
    """An adapted tiny Llama of four layers whose experts already differ."""

    def make(awake=True, **options):
        model = get_peft_model(make_base(num_hidden_layers=4), GraphLoraConfig(**{**SMALL, **options}))
        if awake:
            wake(model)
        return model.eval()

    return make


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def projections(model):
    return {m.block_name: m for m in model.modules() if isinstance(m, GraphLoraProjection)}


# --- the formula of each method -------------------------------------------------------------------------------------


def weights_by_hand(method, u, layer, x):
    """Weight of every expert for one token with logits `u` `[experts]`."""
    pi = u.softmax(0)
    order = sorted(range(len(u)), key=lambda e: -u[e].item())
    if method in ("loramoe", "hydralora"):
        return pi
    if method in ("ming_moe", "mola"):
        kept = torch.stack([u[e] for e in order[:2]]).softmax(0)
        return torch.zeros(len(u)).scatter(0, torch.tensor(order[:2]), kept)
    if method == "dynmole":
        if (1 - (pi**1.1).sum()) / 0.1 > 0.9:
            return pi
        mass, chosen = 0.0, []
        for e in order:
            if mass < 0.75 or len(chosen) < 2:
                chosen.append(e)
                mass += pi[e].item()
        return torch.stack([pi[e] if e in chosen else torch.zeros(()) for e in range(len(u))])
    router = layer.router("default")
    hidden = (router.sparsity_proj @ x + router.sparsity_proj_bias).relu()
    lam = F.logsigmoid(router.sparsity_out @ hidden + router.sparsity_out_bias) + 0.99
    low, high = u.min() - 10, u.max()
    for _ in range(100):  # tau by bisection: the weights fall in tau, and must sum to 1
        tau = (low + high) / 2
        low, high = (tau, high) if ((u - tau).relu() / (1 - lam)).sum() > 1 else (low, tau)
    return (u - tau).relu() / (1 - lam)


@pytest.mark.parametrize("method", PER_PROJECTION)
def test_a_projection_computes_the_formula(make, method):
    """`W x + (alpha / r) sum_e w_e B_e A_e x`, expert by expert and token by token."""
    model = make(preset=method)
    layer = projections(model)["model.layers.3.mlp.down_proj"]
    router, experts = layer.router("default"), layer.graphlora_experts["default"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) / 4)
        if method == "ming_moe":
            router.bias.copy_(torch.randn(router.bias.shape, generator=generator))
        x = 2 * torch.randn(2, 6, 32, generator=generator)
        found = layer(x).reshape(12, 16)
        for token, out in zip(x.reshape(12, 32), found, strict=True):
            u = router.weight @ token + (router.bias if method == "ming_moe" else 0)
            w = weights_by_hand(method, u, layer, token)
            expected = layer.base_layer.weight @ token
            for e in range(len(u)):
                A = experts.lora_A[0 if method == "hydralora" else e]
                expected = expected + w[e] * 4 / 2 * experts.lora_B[e] @ (A @ token)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_block_of_mixlora_computes_the_formula(make):
    """`sum_e w_e E_e(x)`, E_e the whole FFN with the deltas of expert e, w the two largest, renormalized."""
    model = make(preset="mixlora", num_experts=4)
    layer = next(m for m in model.modules() if isinstance(m, GraphLoraLayer))
    mlp, pairs = (
        layer.base_layer,
        {p: getattr(layer, f"graphlora_{p}_proj")["default"] for p in ("gate", "up", "down")},
    )
    with torch.no_grad():
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        for token, out in zip(x, layer(x[None])[0], strict=True):
            pi = (layer.router("default").weight @ token).softmax(0)
            chosen = pi.argsort(descending=True)[:2].tolist()
            expected = torch.zeros(16)
            for e in chosen:

                def linear(name, z, e=e):
                    weight = getattr(mlp, f"{name}_proj").weight
                    return weight @ z + 2 * pairs[name].lora_B[e] @ (pairs[name].lora_A[e] @ z)

                hidden = F.silu(linear("gate", token)) * linear("up", token)
                expected = expected + pi[e] / sum(pi[c] for c in chosen) * linear("down", hidden)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_where_each_method_sits(make):
    for method in PRESETS:
        model = make(preset=method)
        names = {name.rpartition(".")[2] for name in projections(model)}
        ffn, attention = {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
        expected = ffn | attention if method in EVERYWHERE else ffn if method in PER_PROJECTION else set()
        assert names == expected, method
        plain = {m.block_name.rpartition(".")[2] for m in model.modules() if isinstance(m, GraphLoraLinear)}
        assert plain == (attention if method in ("mixlora", "graphlora", "released") else set()), method


def test_layers_of_mola_have_more_experts_the_higher_they_are(make):
    counts = {name: m.router("default").num_experts for name, m in projections(make(preset="mola")).items()}
    for layer, expected in enumerate([2, 4, 6, 8]):
        assert {n for name, n in counts.items() if f"layers.{layer}." in name} == {expected}
    model = make(preset="mola", num_experts_by_layer=[2, 5], num_experts_pattern={"layers.3.mlp.up_proj": 3})
    counts = {name: m.router("default").num_experts for name, m in projections(model).items()}
    assert [counts[f"model.layers.{i}.mlp.up_proj"] for i in range(4)] == [2, 2, 5, 3]
    assert {
        m.router("default").num_experts for m in projections(make(preset="mola", num_experts=3)).values()
    } == {3}


# --- the auxiliary losses, over routers and real tokens -------------------------------------------------------------


def routing_by_router(model, batch):
    """Weights and probabilities of the real tokens, and sums of weights by sample, of each router."""
    keep = batch["attention_mask"].reshape(-1).bool()
    with model.base_model.record_routing() as record:
        out = model(**batch)
    found = []
    for routing in record.values():
        weights = torch.zeros_like(routing.router_probs)
        weights = weights.scatter(1, routing.top_k_index, routing.top_k_weights)
        q = (weights * keep[:, None]).view(len(batch["input_ids"]), -1, weights.shape[1]).sum(1)
        found.append(
            (weights[keep], routing.router_probs[keep], getattr(routing, "sparsity", None), q, routing, keep)
        )
    return out, found


def balance_by_hand(form, weights, probs, q):
    n, chosen = probs.shape[1], (weights > 0).float()
    if form == "switch":
        return n * (chosen.mean(0) * probs.mean(0)).sum()
    if form in ("mola", "ld_mole"):
        return n * (chosen.sum(0) / chosen.sum() * probs.mean(0)).sum()
    if form == "dynmole":
        return n * (weights.mean(0) * probs.mean(0)).sum()
    mean = q.mean()
    return ((q - mean) ** 2).sum() / (q.numel() - 1) / (mean**2 if form == "loramoe" else mean)


@pytest.mark.parametrize("form", ["switch", "mola", "ld_mole", "dynmole", "loramoe", "loramoe_paper"])
@pytest.mark.parametrize("preset", ["ming_moe", "mola", "dynmole", "ld_mole"])
def test_balance_loss_over_routers_and_real_tokens(make, preset, form):
    model = make(
        preset=preset, router_aux_loss_form=form, router_aux_loss_coef=0.3, router_entropy_loss_coef=0.0
    )
    out, found = routing_by_router(model, make_batch([5, 8, 3]))
    values = torch.stack([balance_by_hand(form, w, p, q) for w, p, _, q, _, _ in found])
    expected = values.sum() if form in ("mola", "loramoe", "loramoe_paper") else values.mean()
    torch.testing.assert_close(out.aux_loss, 0.3 * expected, rtol=1e-4, atol=1e-5)


def test_switch_form_over_all_layers_at_once(make):
    model = make(preset="mixlora", router_aux_loss_form="switch_all_layers")
    out, found = routing_by_router(model, make_batch([5, 8, 3]))
    weights, probs = (torch.cat([entry[i] for entry in found]) for i in (0, 1))
    expected = 8 * ((weights > 0).float().mean(0) * probs.mean(0)).sum()
    torch.testing.assert_close(out.aux_loss, 0.01 * expected)


def test_entropy_loss_of_dynmole(make):
    model = make(preset="dynmole", router_aux_loss_coef=0.0)
    out, found = routing_by_router(model, make_batch([5, 8, 3]))
    entropies = torch.stack([((1 - (p**1.1).sum(1)) / 0.1).mean() for _, p, *_ in found])
    torch.testing.assert_close(out.aux_loss, 0.01 * entropies.mean())


def test_sparsity_loss_of_ld_mole(make):
    model = make(preset="ld_mole", router_aux_loss_coef=0.0, router_sparsity_loss_coef=2.0)
    out, found = routing_by_router(model, make_batch([5, 8, 3]))
    values = []
    for _, _, sparsity, _, routing, keep in found:
        u = routing.router_logits.sort(dim=1, descending=True).values
        lower = 1 - (u[:, 0] + u[:, 1] - 2 * u[:, 2])
        values.append((lower - sparsity).clamp_min(0)[keep].mean())
    torch.testing.assert_close(out.aux_loss, 2 * torch.stack(values).mean())
    out.aux_loss.backward()
    layer = projections(model)["model.layers.0.mlp.up_proj"]
    assert layer.router("default").sparsity_out_bias.grad != 0
    assert layer.router("default").weight.grad is None or not layer.router("default").weight.grad.any()


# --- life of an adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_and_a_disabled_one_change_nothing(make, variant):
    batch = make_batch([5, 8, 3])
    expected = logits(make_base(num_hidden_layers=4).eval(), batch)
    model = make(awake=False, **VARIANTS[variant])
    exact = variant in PER_PROJECTION
    torch.testing.assert_close(
        logits(model, batch), expected, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5
    )
    wake(model)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(model.unload(), batch), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_trains_saves_loads_and_generates(make, tmp_path, variant):
    batch = make_batch([5, 8, 3])
    torch.manual_seed(0)
    model = make(awake=False, **VARIANTS[variant]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(25):
        out = model(**batch)
        losses.append((out.loss - out.aux_loss).item())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert all(sum(s["expert_load"]) == pytest.approx(1) for s in model.base_model.routing_stats().values())
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(num_hidden_layers=4), tmp_path, adapter_name="again").eval()
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    assert loaded.base_model.routing_stats() == model.base_model.routing_stats()
    prompt = {"input_ids": batch["input_ids"][1:2], "attention_mask": batch["attention_mask"][1:2]}
    made = [m.generate(**prompt, max_new_tokens=6, do_sample=False) for m in (model, loaded)]
    assert made[0].shape == (1, 14)
    assert torch.equal(*made)


@pytest.mark.parametrize("method", PRESETS)
def test_every_trained_weight_gets_a_gradient_and_padding_none(make, method):
    def gradients(batch):
        """Of a model of its own: cumulative loads would remember the batch before."""
        model = make(preset=method, lora_dropout=0.0).train()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    short = gradients(make_batch([5, 8, 3]))
    padded = gradients(make_batch([5, 8, 3], width=13))
    for name, grad in short.items():
        torch.testing.assert_close(padded[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", PER_PROJECTION)
def test_the_loop_over_experts_gives_the_same(make, method):
    batch = make_batch([5, 8, 3])
    torch.testing.assert_close(
        logits(make(preset=method, backend="eager"), batch),
        logits(make(preset=method), batch),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("method", PRESETS)
def test_half_precision_bases_keep_float32_routing(method):
    base = make_base().to(torch.bfloat16)
    model = get_peft_model(base, GraphLoraConfig(preset=method, **{**SMALL, "lora_dropout": 0.0})).train()
    wake(model)
    with model.base_model.record_routing() as record:
        out = model(**make_batch([5, 8, 3]))
    assert out.logits.dtype == torch.bfloat16
    assert out.aux_loss.dtype == torch.float32
    assert {t.dtype for r in record.values() for t in (r.router_logits, r.router_probs, r.top_k_weights)} == {
        torch.float32
    }
    out.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


def test_two_adapters_of_one_kind_live_side_by_side(make):
    batch = make_batch([5, 8, 3])
    model = make(preset="mola")
    first = logits(model, batch)
    model.add_adapter("other", GraphLoraConfig(preset="mola", **{**SMALL, "r": 3}))
    torch.testing.assert_close(logits(model, batch), first)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model, batch), logits(make_base(num_hidden_layers=4).eval(), batch))
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model, batch), first)


@pytest.mark.parametrize(
    ("first", "second"), [("loramoe", "mixlora"), ("mixlora", "loramoe"), ("mola", "loramoe_attention")]
)
def test_adapters_of_two_kinds_are_refused(make, first, second):
    other = {"preset": second}
    if second == "loramoe_attention":
        other = {"preset": "loramoe", "attention_target_modules": ["q_proj"]}
    model = make(preset=first)
    with pytest.raises(GraphLoraError, match="separate copies of the base model"):
        model.add_adapter("other", GraphLoraConfig(**{**SMALL, **other}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_scope": "projection"}, "router_scope='projection' needs router_type='linear'"),
        ({"router_gate": "dense"}, "router_gate='dense' needs router_type='linear'"),
        ({"preset": "mixlora", "router_gate": "top_p"}, "expert_granularity='linear'"),
        ({"preset": "mixlora", "shared_lora_A": True}, "shared_lora_A=True needs router_scope='projection'"),
        ({"attention_experts": True}, "attention_experts=True needs router_scope='projection'"),
        (
            {"preset": "mola", "num_experts_by_layer": [1, 4]},
            "num_experts_by_layer=1 must be a whole number from 2",
        ),
        ({"preset": "mola", "num_experts_by_layer": []}, "num_experts_by_layer=\\[\\] names no count"),
        ({"preset": "mola", "router_sparsity_loss_coef": 0.1}, "needs router_gate='sparsegen'"),
        ({"router_top_p": 1.5}, "router_top_p=1.5"),
        ({"router_entropy_index": 1.0}, "router_entropy_index=1.0"),
        ({"router_aux_loss_form": "swich"}, "Did you mean 'switch'"),
        ({"preset": "mixlor"}, "Did you mean 'mixlora'"),
    ],
)
def test_a_mistake_is_named(options, message):
    with pytest.raises(GraphLoraError, match=message):
        GraphLoraConfig(**options)


def test_a_saved_configuration_keeps_the_counts_it_had(tmp_path):
    for options in ({}, {"num_experts": 3}, {"num_experts_by_layer": [2, 3]}):
        config = GraphLoraConfig(preset="mola", **options)
        config.save_pretrained(tmp_path)
        again = peft.PeftConfig.from_pretrained(tmp_path)
        assert (again.num_experts, again.num_experts_by_layer) == (
            config.num_experts,
            config.num_experts_by_layer,
        )
