"""The cost model: its formulas against the real adapter and against reasoning, and the page that it writes."""

import re
from dataclasses import replace

import pytest
import torch
from benchmarks.candidates.models import active_adapter_weights, graphlora_config, model_config, step_flops
from benchmarks.measurement import Measurement
from benchmarks.scaling import (
    Collective,
    activation_bytes,
    collectives,
    compute_seconds,
    first_limit,
    hidden_from,
    largest_of,
    memory,
    step,
    waiting_share,
    with_global_batch,
)
from benchmarks.scaling import step_flops as model_flops
from benchmarks.scaling_measured import measured_mfu, read_two_gpus
from benchmarks.scaling_page import TABLES, update_page
from benchmarks.scaling_plan import ETHERNET, NF4, SLOW, Adapter, Cluster, Plan
from benchmarks.shapes import LLAMA3_8B, LLAMA3_70B, LLAMA3_405B, Shape
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from graphlora.benchmark.memory import measure_saved
from graphlora.errors import GraphLoraError

SMALL = Shape("small", "llama", 64, 160, 2, 4, 2, 128)


def adapted(shape, layers, **changes):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(model_config(shape, layers)).to(torch.bfloat16)
    config = graphlora_config(changes.pop("r", 8), "torch")
    for name, value in changes.items():
        setattr(config, name, value)
    return get_peft_model(base, config).train()


@pytest.mark.parametrize(
    "options", [{}, {"r": 4}, {"num_experts": 4, "top_k": 1}, {"router_hidden_size": 32, "r": 2}]
)
def test_sizes_of_the_adapter_are_those_of_the_real_one(options):
    model = adapted(SMALL, 2, **options)
    adapter = Adapter(**options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.parameters(SMALL)
    if "top_k" not in options:
        assert active_adapter_weights(model) == adapter.active_parameters(SMALL)


@pytest.mark.parametrize("options", [{}, {"r": 2}, {"num_experts": 16, "top_k": 4, "router_hidden_size": 32}])
def test_activations_are_those_that_autograd_keeps(options):
    def saved(layers, tokens):
        model = adapted(SMALL, layers, **options)
        ids = torch.arange(tokens)[None] % SMALL.vocab_size
        with measure_saved([*model.parameters(), *model.buffers()]) as found:
            model(input_ids=ids, labels=ids)
        return found.num_bytes

    per_layer = [(saved(4, tokens) - saved(2, tokens)) / 2 for tokens in (128, 256)]
    measured = (per_layer[1] - per_layer[0]) / 128
    assert activation_bytes(SMALL, Adapter(**options)) == pytest.approx(measured, rel=0.01)


def test_flops_agree_with_those_of_the_benchmarks():
    plan = Plan(LLAMA3_8B, 1, checkpointing=False)
    active = plan.adapter.active_parameters(LLAMA3_8B)
    assert model_flops(plan) == step_flops(LLAMA3_8B, 32, plan.tokens, plan.length, active)
    assert model_flops(replace(plan, checkpointing=True)) > 1.3 * model_flops(plan)


def test_the_loads_are_one_all_reduce_per_forward_of_a_few_bytes():
    for mode in ("ddp", "fsdp", "hybrid"):
        loads = [c for c in collectives(Plan(LLAMA3_8B, 64, mode, micro_batches=4)) if c.what == "loads"]
        assert [(c.kind, c.count, c.num_bytes, c.gpus) for c in loads] == [
            ("all_reduce", 4, 4 * 4 * 32 * (8 + 9), 64)
        ]


def test_a_sharded_base_is_gathered_twice_per_micro_batch_and_gradients_travel_once():
    plan = Plan(LLAMA3_8B, 64, "fsdp", micro_batches=3)
    found = {c.what: c for c in collectives(plan)}
    assert found["weights of layers"].count == 2 * 3 * 32
    assert found["weights of layers"].num_bytes == 2 * 3 * 32 * 2 * LLAMA3_8B.layer_matmul()
    assert found["gradients"].num_bytes == 4 * plan.adapter.parameters(LLAMA3_8B)
    assert "weights of layers" not in {c.what for c in collectives(replace(plan, mode="ddp"))}
    assert {c.gpus for c in collectives(replace(plan, mode="hybrid")) if "weights" in c.what} == {8}


@pytest.mark.parametrize(
    ("kind", "gpus", "seconds"), [("all_gather", 8, 7 / 8), ("all_reduce", 8, 7 / 4), ("all_reduce", 1, 0.0)]
)
def test_a_large_collective_takes_its_share_of_the_bytes_over_the_bandwidth(kind, gpus, seconds):
    cluster = Cluster(nvlink=1e9, share=1.0, launch=0.0, hop=0.0)
    assert Collective("x", kind, 1, 1e9, gpus).seconds(cluster) == pytest.approx(seconds)


def test_bandwidth_is_the_networks_as_soon_as_a_second_node_takes_part():
    assert SLOW.bandwidth(8) == Cluster().bandwidth(8) == 0.8 * 450e9
    assert SLOW.bandwidth(9) == 0.8 * 50e9
    assert Cluster().tree_latency(1024) < Cluster().ring_latency(1024)


def test_memory_of_a_frozen_base_and_its_share():
    parts = memory(Plan(LLAMA3_8B, 1))
    assert parts["base"] == pytest.approx(2 * 8.03e9, rel=0.01)
    assert memory(Plan(LLAMA3_8B, 8, "fsdp"))["base"] == pytest.approx(parts["base"] / 8)
    assert memory(Plan(LLAMA3_8B, 64, "hybrid"))["base"] == pytest.approx(parts["base"] / 8)
    assert parts["optimizer"] == 2 * parts["adapter"] == 2 * parts["gradients"]
    assert pytest.approx(4.127 / 8, rel=1e-3) == NF4
    assert memory(Plan(LLAMA3_8B, 1, checkpointing=False))["activations"] > 3 * parts["activations"]


@pytest.mark.parametrize(
    ("plan", "limit"),
    [
        (Plan(LLAMA3_70B, 8, "ddp"), "memory (base)"),
        (Plan(LLAMA3_70B, 8, "ddp", bits=4), "nothing"),
        (Plan(LLAMA3_405B, 64, "fsdp"), "nothing"),
        (Plan(LLAMA3_405B, 64, "fsdp", cluster=ETHERNET), "interconnect"),
        (Plan(LLAMA3_8B, 64, "fsdp", tokens=256, cluster=SLOW), "interconnect"),
        (Plan(LLAMA3_8B, 8, "ddp", tokens=200_000), "memory (logits)"),
    ],
)
def test_what_breaks_first(plan, limit):
    assert first_limit(plan) == limit


def test_gathering_hides_from_the_same_number_of_tokens_for_every_model():
    numbers = [hidden_from(Plan(shape, 64, "fsdp", cluster=SLOW)) for shape in (LLAMA3_8B, LLAMA3_405B)]
    assert numbers[0] == pytest.approx(numbers[1])
    enough, too_few = (
        step(Plan(LLAMA3_70B, 64, "fsdp", tokens=int(share * numbers[0]), cluster=SLOW)).efficiency
        for share in (1.5, 0.5)
    )
    assert enough > 0.9 > 0.6 > too_few


def test_a_step_is_no_faster_than_its_products_and_slower_with_more_gpus():
    for mode in ("ddp", "fsdp", "hybrid"):
        times = [step(Plan(LLAMA3_8B, gpus, mode, cluster=SLOW)) for gpus in (8, 64, 1024)]
        assert times[0].seconds <= times[1].seconds <= times[2].seconds
        assert all(0 < found.efficiency < 1 for found in times)
    assert compute_seconds(Plan(LLAMA3_8B, bits=4)) > compute_seconds(Plan(LLAMA3_8B))


def test_the_slowest_of_more_gpus_is_slower():
    draws = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    assert largest_of(64) == pytest.approx(float(draws.amax(dim=1).mean()), rel=0.02)
    assert largest_of(1) == 0
    assert waiting_share(0.1, 8, 16, each=True) == pytest.approx(4 * waiting_share(0.1, 8, 16, each=False))


def test_a_global_batch_is_cut_into_micro_batches_and_needs_a_row_per_gpu():
    plan = with_global_batch(Plan(LLAMA3_8B, 8), 2**19)
    assert (plan.micro_batches, plan.tokens) == (8, 8192)
    assert step(plan).num_tokens == 2**19
    with pytest.raises(ValueError, match="256 rows, fewer than 1024 GPUs"):
        with_global_batch(Plan(LLAMA3_8B, 1024), 2**19)


def measured(ms: float) -> list[Measurement]:
    case = "llama3-8b all layers 8x1024"
    values = {"full": ms, "peak_memory": 60e9}
    return [Measurement("step", case, "triton_r8", name, value=value) for name, value in values.items()]


def test_the_page_gets_its_tables_and_the_newest_measurements(tmp_path):
    page = tmp_path / "scaling.md"
    page.write_text("".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in TABLES))
    update_page([], {}, page)
    assert "assumed" in page.read_text()
    assert "nothing here is checked" in page.read_text()
    two = {"scaling": {"one": {"step_seconds": 0.8}, "ddp": {"step_seconds": 0.82, "efficiency": 0.976}}}
    update_page(measured(800.0), two, page)
    text = page.read_text()
    assert measured_mfu(measured(400.0)) == pytest.approx(2 * measured_mfu(measured(800.0)))
    assert "measured, one GPU" in text
    assert re.search(
        r"\| two GPUs, ddp: speed of a GPU over that of one alone \| (0\.99\d|1\.000) \| 0\.976 \|", text
    )
    assert "peak memory" in text
    page.write_text("no markers")
    with pytest.raises(GraphLoraError, match="0 blocks"):
        update_page([], {}, page)


def test_a_broken_record_of_two_gpus_is_named(tmp_path):
    assert read_two_gpus(tmp_path / "none.json") == {}
    (tmp_path / "two_gpus.json").write_text("{}")
    with pytest.raises(GraphLoraError, match="is not a record of two GPUs"):
        read_two_gpus(tmp_path / "two_gpus.json")
