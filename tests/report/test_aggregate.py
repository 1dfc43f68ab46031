"""From records to numbers, with numbers worked out by hand."""

import dataclasses
import math

import pytest
from study_records import study_record, sweep_records, write_records

from graphlora.errors import GraphLoraError
from graphlora.report.aggregate import aggregate, metric_mean, stability, variant_runs
from graphlora.report.names import AVERAGE, ordered_variants, variant_label
from graphlora.report.reading import read_studies
from graphlora.report.routing import load_cv, routing_health
from graphlora.report.sweep import changed_field, sweep_panels


def numbers_of(records, folder, **options):
    write_records(records, folder)
    (study,), _ = read_studies(folder, all_commits=True)
    return aggregate(study, **options)


def scored(variant, task, scores, **rest):
    return [study_record(variant, task, seed, score, **rest) for seed, score in scores.items()]


@pytest.fixture
def numbers(tmp_path):
    records = scored("graphlora", "quiz", {0: 60, 1: 62, 2: 64}) + scored(
        "graphlora", "boolq", {0: 70, 1: 70, 2: 70}
    )
    records += scored("lora", "quiz", {0: 59, 1: 60, 2: 61, 3: 90}) + scored("lora", "boolq", {0: 66, 2: 74})
    records += (
        scored("dora", "quiz", {1: 65}) + scored("base", "quiz", {0: 40}) + scored("base", "boolq", {0: 50})
    )
    return numbers_of(records, tmp_path)


def test_cells_hold_mean_and_deviation_in_percent(numbers):
    (scores,) = numbers.models
    cell = scores.cells["graphlora", "quiz"]
    assert cell.values == pytest.approx({0: 60, 1: 62, 2: 64})
    assert cell.summary.mean == pytest.approx(62)
    assert cell.summary.std == pytest.approx(2)
    assert scores.variants == ("base", "lora", "dora", "graphlora")
    assert scores.trained == ("lora", "dora", "graphlora")


def test_average_is_taken_seed_by_seed_over_the_seeds_with_every_task(numbers):
    (scores,) = numbers.models
    assert scores.cells["graphlora", AVERAGE].values == pytest.approx({0: 65, 1: 66, 2: 67})
    assert scores.cells["lora", AVERAGE].values == pytest.approx({0: 62.5, 2: 67.5})
    assert scores.cells["base", AVERAGE].summary.mean == pytest.approx(45)
    assert ("dora", AVERAGE) not in scores.cells
    assert scores.overall == AVERAGE


def test_comparisons_pair_shared_seeds_and_correct_over_all_of_them(numbers):
    assert numbers.reference == "graphlora"
    found = {(c.variant, c.column): c for c in numbers.comparisons}
    assert set(found) == {("lora", "quiz"), ("lora", "boolq"), ("lora", AVERAGE), ("dora", "quiz")}
    lora = found["lora", "quiz"]
    # Differences -1, -2, -3: t = -2 / sqrt(1 / 3), p = 1 - sqrt(12 / 14); three tests, the smallest p first.
    assert (lora.difference.n, lora.difference.mean) == (3, pytest.approx(-2))
    assert lora.t_p == pytest.approx(1 - math.sqrt(12 / 14))
    assert lora.flip_p == 2 / 8
    assert lora.holm_p == pytest.approx(3 * lora.t_p)
    # Differences -4, 4: mean zero.
    assert found["lora", "boolq"].t_p == pytest.approx(1)
    assert found["dora", "quiz"].t_p is None
    assert found["dora", "quiz"].holm_p is None


def test_missing_runs_and_seeds_are_said(numbers):
    assert numbers.missing == (
        "lora on boolq: seed 1.",
        "dora on boolq: no run.",
        "dora on quiz: seeds 0, 2, 3.",
        "graphlora on quiz: seed 3.",
    )


def test_stability_is_a_ratio_of_variances(tmp_path):
    records = scored("graphlora", "quiz", {0: 1, 1: 2, 2: 3}) + scored("mixlora", "quiz", {0: 1, 1: 3, 2: 5})
    records += scored("graphlora", "boolq", {0: 1, 1: 2, 2: 3}) + scored(
        "mixlora", "boolq", {0: 1, 1: 2, 2: 3}
    )
    (scores,) = numbers_of(records, tmp_path).models
    quiz = stability(scores, "mixlora", "graphlora", "quiz")
    # F(0.975; 2, 2) = 39.
    assert (quiz.ratio, quiz.low, quiz.high) == (
        pytest.approx(4),
        pytest.approx(4 / 39),
        pytest.approx(4 * 39),
    )
    pooled = stability(scores, "mixlora", "graphlora")
    # Pooled variances (4 + 1) / 2 and 1, four degrees each.
    assert (pooled.ratio, pooled.high) == (pytest.approx(2.5), pytest.approx(2.5 * 9.60453, rel=1e-5))


def test_reference_is_graphlora_unless_named(tmp_path):
    records = scored("graphlora_released", "quiz", {0: 50}) + scored("lora", "quiz", {0: 50})
    assert numbers_of(records, tmp_path).reference == "graphlora_released"
    assert numbers_of(records, tmp_path, reference="lora").reference == "lora"
    with pytest.raises(
        GraphLoraError, match="no variant 'laro' to compare with; it has: graphlora_released, lora"
    ):
        numbers_of(records, tmp_path, reference="laro")


def test_without_a_graphlora_variant_nothing_is_compared(tmp_path):
    numbers = numbers_of(
        scored("lora", "quiz", {0: 50}, method="lora") + scored("dora", "quiz", {0: 51}, method="dora"),
        tmp_path,
    )
    assert numbers.reference is None
    assert numbers.comparisons == ()


def test_a_loss_stays_in_nats(tmp_path):
    record = study_record("lora", "notes", 0, 50)
    metrics = record.metrics | {"metric": "loss", "test": {"notes": {"loss": 2.25}}}
    (scores,) = numbers_of([dataclasses.replace(record, metrics=metrics)], tmp_path).models
    assert scores.cells["lora", "notes"].summary.mean == 2.25


def test_tasks_tested_after_different_training_are_different_columns(tmp_path):
    def transfer(variant, task, value):
        record = study_record(variant, task, 0, 50)
        test = {name: {"acc_norm": value} for name in ("boolq", "quiz")}
        return dataclasses.replace(record, metrics=record.metrics | {"test": test})

    records = [
        transfer("graphlora", "quiz", 0.5),
        transfer("graphlora", "boolq", 0.6),
        transfer("base", "quiz", 0.4),
    ]
    (scores,) = numbers_of(records, tmp_path).models
    assert scores.cells["graphlora", "boolq"].summary.mean == pytest.approx(60)
    assert scores.cells["graphlora", "boolq (trained on quiz)"].summary.mean == pytest.approx(50)
    assert scores.cells["base", "boolq (trained on quiz)"].summary.mean == pytest.approx(40)


def test_a_mixture_needs_no_note_of_what_it_was_trained_on(tmp_path):
    record = study_record("graphlora", "both", 0, 50)
    test = {name: {"acc_norm": 0.5} for name in ("boolq", "quiz")}
    record = dataclasses.replace(record, metrics=record.metrics | {"test": test})
    base = study_record("base", "boolq", 0, 40)
    (scores,) = numbers_of([record, base], tmp_path).models
    assert scores.tasks == ("boolq", "quiz")


def test_two_folders_of_one_model_are_one_model(tmp_path):
    one, two = study_record("lora", "quiz", 0, 50), study_record("lora", "quiz", 1, 50)
    numbers = numbers_of([one, dataclasses.replace(two, model="/elsewhere/tiny-135M/")], tmp_path)
    assert [scores.model for scores in numbers.models] == ["tiny-135M"]


def test_costs_are_means_over_runs(tmp_path):
    records = [study_record("lora", "quiz", seed, 50, step_time=0.1 * (seed + 1)) for seed in range(3)]
    (scores,) = numbers_of(records, tmp_path).models
    runs = variant_runs(scores, "lora")
    assert metric_mean(runs, "step_time") == pytest.approx(0.2)
    assert metric_mean(runs, "peak_memory") == 10 * 2**30
    assert metric_mean(runs, "tokens_per_second") is None


def test_routing_takes_the_worst_block_of_a_layer_and_sums_dead_experts(tmp_path):
    def blocks(cv, dead):
        return {
            "model.layers.3.mlp.up_proj": {
                "load_cv": cv,
                "entropy": 0.8,
                "dead_experts": dead,
                "tie_rate": 0.01,
            },
            "model.layers.3.mlp.down_proj": {
                "load_cv": 0.1,
                "entropy": 0.6,
                "dead_experts": 1,
                "tie_rate": None,
            },
        }

    records = [
        study_record("mola", "quiz", seed, 50, routing=blocks(cv, seed)) for seed, cv in enumerate((0.3, 0.5))
    ]
    (scores,) = numbers_of([*records, study_record("lora", "quiz", 0, 50)], tmp_path).models
    (health,) = routing_health(scores)
    assert (health.variant, health.n, health.layers) == ("mola", 2, (3,))
    assert health.cv == (pytest.approx(0.4),)
    assert health.worst_cv == 0.5
    assert health.entropy == (pytest.approx(0.7),)
    assert health.dead_by_run == (1, 2)
    assert health.tie_percent == pytest.approx(1)
    assert health.overlap is None


def test_load_variation_is_worked_out_where_it_is_not_recorded():
    # Loads 1/2, 1/4, 1/4: mean 1/3, variance (1/36 + 1/144 + 1/144) / 3 = 1/72, so CV = 3 / sqrt(72).
    assert load_cv({"expert_load": [0.5, 0.25, 0.25]}) == pytest.approx(3 / math.sqrt(72))
    assert load_cv({"load_cv": 0.2, "expert_load": [1, 0]}) == 0.2
    assert load_cv({"expert_load": None}) is None


def test_settings_of_a_sweep_are_found_from_what_the_variants_change(tmp_path):
    numbers = numbers_of(sweep_records(seeds=[0], tasks={"quiz": 40}), tmp_path)
    panels = {panel.field: panel for panel in sweep_panels(numbers.models[0], numbers.reference)}
    assert [value for value, _ in panels["num_experts"].points] == ["4", "8", "12", "16", "32"]
    assert panels["r"].points[3] == ("8", "graphlora")
    assert [value for value, _ in panels["edge_density"].points] == ["0.1", "0.2", "0.4", "0.6", "0.8"]
    assert [value for value, _ in panels["edge_init"].points] == [
        "none",
        "random",
        "ring",
        "complete",
        "learned",
    ]
    assert len(panels["graph_seed"].points) == 5


def test_a_variant_that_changes_more_is_no_point_of_a_sweep():
    base = {"r": 8, "lora_alpha": 16, "num_experts": 8, "router_type": "graph", "seed": 1}
    assert changed_field(base, base | {"r": 4, "lora_alpha": 8, "seed": 2}) == "r"
    assert changed_field(base, base | {"lora_alpha": 8}) is None
    assert changed_field(base, base | {"r": 4, "num_experts": 4}) is None
    assert changed_field(base, base | {"router_type": "linear"}) is None
    assert changed_field(base, base) is None


def test_names_and_order():
    assert variant_label("mixlora_top_1") == "MixLoRA top 1"
    assert variant_label("graphlora_no_poisson") == "GraphLoRA no Poisson"
    assert variant_label("my_own") == "my own"
    names = ["n16", "graphlora", "n4", "mixlora", "lora_matched", "base", "lora", "graphlora_no_graph"]
    assert ordered_variants(names, "graphlora") == [
        "base",
        "lora",
        "lora_matched",
        "mixlora",
        "graphlora",
        "graphlora_no_graph",
        "n4",
        "n16",
    ]
