"""What docs/findings.md and the README say in sentences is what the committed records say."""

from statistics import fmean

from findings import (
    PAGE,
    ROOT,
    assert_said,
    compared,
    differences,
    mean_by_seed,
    numbers_of,
    over_averages,
    overlaps,
    records_of,
    routers,
    scores_of,
    worst_cv,
)

from graphlora.report.aggregate import stability
from graphlora.report.inference import holm, summarize
from graphlora.report.names import AVERAGE

TABLE, MORE, FRESH = "table1_small", "table1_small_more", "graph_small"
ABLATIONS = ("graphlora_no_graph", "graphlora_no_poisson", "graphlora_no_normal")
PLANNED = ("lora", "lora_matched", "mixlora", *ABLATIONS)


def average(study, variant):
    return compared(study)[1][variant]


def on_task(study, variant, task):
    (found,) = (c for c in compared(study)[0] if (c.variant, c.column) == (variant, task))
    return found


def ten_seeds(variant):
    """Interval of the difference to `graphlora` over seeds 0 to 9."""
    scores = [mean_by_seed(*(records_of(s)[v] for s in (TABLE, FRESH))) for v in (variant, "graphlora")]
    return summarize(differences(*scores))


def num_dead(study, variant):
    return sum(block["dead_experts"] for block in routers(records_of(study)[variant]))


def test_the_numbers_of_tests_are_those_of_the_reports():
    for study, text in (
        (TABLE, "corrected for the report's {} tests"),
        (MORE, "corrected for the report's {} tests"),
        (FRESH, "the report itself counts {} tests"),
    ):
        part = PAGE.split(f"`results/{study}`")[1]
        assert_said(text, len(compared(study)[0]), page=part)
    assert_said(
        "over its three averages plain LoRA of equal size has {})", over_averages(FRESH)["lora_matched"]
    )


def test_both_counts_of_tests_as_methods_joined():
    presets = (*PLANNED, "graphlora_paper", "graphlora_released")
    for label, variants in (
        ("the six that were planned", PLANNED),
        ("with two presets", presets),
        ("with five other methods, as below", tuple(compared(TABLE)[1])),
    ):
        tests = [c for c in compared(TABLE)[0] if c.variant in variants]
        p = dict(zip([(c.variant, c.column) for c in tests], holm([c.t_p for c in tests]), strict=True))
        averages = over_averages(TABLE, variants)
        told = (len(tests), p["lora_matched", AVERAGE], len(averages), averages["lora_matched"])
        assert_said(f"| {label} | {{}}, {{}} | {{}}, {{}} |", *told)


def test_plain_lora_of_equal_size():
    first, more, fresh = (average(study, "lora_matched") for study in (TABLE, MORE, FRESH))
    low = over_averages(TABLE)["lora_matched"]
    assert low < 0.05 < first.holm_p
    assert_said("wins by {} points if the averages alone are counted**", first.difference.mean)
    assert_said("(corrected p {}; over the {} tests of", low, len(compared(TABLE)[0]))
    assert_said("tasks and averages {}, a tie)", first.holm_p)
    assert_said("seeds, where it was {} with p {}.", fresh.difference.mean, fresh.t_p)
    assert_said("On the two further tasks it was {}, a tie", more.difference.mean)
    challenge = on_task(MORE, "lora_matched", "arc_challenge")
    assert_said("a tie, with a win of {} points on ARC-Challenge", challenge.difference.mean)
    size = first.difference
    assert_said("That win is {} points on average ({} to {}, corrected", size.mean, size.low, size.high)
    assert_said("corrected p {} over the {} averages)", low, 13)
    assert_said("a tie over all {} tests ({})", len(compared(TABLE)[0]), first.holm_p)
    easy = on_task(TABLE, "lora_matched", "arc_easy")
    told = (easy.difference.mean, easy.difference.low, easy.difference.high, easy.holm_p)
    assert_said("ARC-Easy ({}, interval {} to {}, corrected p {} over all tests)", *told)
    assert all(on_task(TABLE, "lora_matched", task).difference.mean < 0 for task in ("boolq", "social_iqa"))
    assert_said("not-confirmed): {}, p {}.", fresh.difference.mean, fresh.t_p)
    size = challenge.difference
    told = (size.mean, size.low, size.high, challenge.holm_p)
    assert_said("wins over GraphLoRA: {} points ({} to {}, corrected p {})", *told)


def test_plain_lora_of_a_third_of_the_size_ties_on_every_task():
    for study in (TABLE, MORE, FRESH):
        assert all(c.holm_p > 0.05 for c in compared(study)[0] if c.variant == "lora")
        assert over_averages(study)["lora"] > 0.05


def test_the_other_methods():
    averages = over_averages(TABLE)
    found = {v: (-c.difference.mean, c.holm_p, averages[v]) for v, c in compared(TABLE)[1].items()}
    assert_said("by {} points (corrected p {} over all tests, {} over the averages)", *found["hydralora"])
    assert_said("GraphLoRA wins**, by {} ({} and {})", *found["loramoe_no_constraint"])
    size, of_all, alone = found["loramoe"]
    assert_said("by {} points ({}); over all tests it is a tie ({})", size, alone, of_all)
    assert_said("({} points below, the interval below zero, corrected p {} and {})", *found["mola"])
    assert_said("({} below, the interval holds zero)", found["ming_moe"][0])
    counts = [found[name][at] for at in (1, 2) for name in ("graphlora_paper", "graphlora_released")]
    assert_said("by either count ({} and {}; {} and {})", *counts)
    assert all(p < 0.05 for p in found["hydralora"][1:] + found["loramoe_no_constraint"][1:])
    mola, ming_moe = (average(TABLE, variant).difference for variant in ("mola", "ming_moe"))
    assert mola.high < 0 < ming_moe.high
    records = records_of(TABLE)
    lora = mean_by_seed(records["lora"])
    beaten = [
        summarize(differences(mean_by_seed(records[v]), lora))
        for v in ("hydralora", "loramoe", "loramoe_no_constraint")
    ]
    assert all(one.high < -0.7 for one in beaten), "as far below plain LoRA"


def test_the_balance_of_the_other_methods():
    records = records_of(TABLE)
    blocks = routers(records["loramoe"])
    uneven = sum(block["load_cv"] > 0.25 for block in blocks)
    assert uneven == 1 and not num_dead(TABLE, "loramoe")
    assert_said("(one router of {} is over {},", len(blocks), 0.25)
    for text, variant in (
        ("updates is {} to {},", "loramoe"),
        ("GraphLoRA's {} to {} (", "graphlora"),
        ("shares A: {} to {})", "hydralora"),
    ):
        means = overlaps(records[variant]).values()
        assert_said(text, min(means), max(means))
    shares = [
        100 * num_dead(TABLE, v) / sum(len(block["expert_load"]) for block in routers(records[v]))
        for v in ("ming_moe", "mola")
    ]
    assert_said("leave {}% and {}% of theirs dead", *shares)


def test_no_method_is_more_stable_over_all_tasks():
    (scores,) = numbers_of(TABLE).models
    ratios = [stability(scores, variant, "graphlora") for variant in scores.trained if variant != "graphlora"]
    assert len(ratios) == 13 and "each of the thirteen ratios holds 1" in PAGE
    assert all(ratio and ratio.low < 1 < ratio.high for ratio in ratios)


def test_two_more_tasks():
    scores = {
        (v, task): fmean(
            100 * r["metrics"]["score"] for r in records_of(MORE)[v] if r["metrics"]["task"] == task
        )
        for v in ("base", "lora")
        for task in ("arc_challenge", "openbookqa")
    }
    assert_said("the base model has {} and {}, plain LoRA {} and {}.", *scores.values())
    mixlora = average(MORE, "mixlora")
    assert_said("MixLoRA is {} points below", -mixlora.difference.mean)
    assert_said("counts {} tests ({}), a win", len(compared(MORE)[0]), mixlora.holm_p)
    assert_said("averages alone are counted ({}).", over_averages(MORE)["mixlora"])
    graph = average(MORE, "graphlora_no_graph").difference
    assert_said("The graph: a tie** ({} points; {} to {})", -graph.mean, -graph.high, -graph.low)
    with_it, without = (overlaps(records_of(MORE)[v]) for v in ("graphlora", "graphlora_no_poisson"))
    assert_said("overlap ({} with and without it on ARC-Challenge", with_it["arc_challenge"])
    assert_said("overlap ({} with and without it on ARC-Challenge", without["arc_challenge"])
    assert_said("; {} and {} on OpenBookQA)", with_it["openbookqa"], without["openbookqa"])


def test_the_normal_loss_on_two_more_tasks():
    size = average(MORE, "graphlora_no_normal").difference
    assert_said("Two more tasks: the normal loss is worth {} points", -size.mean)
    assert_said("is worth {} points** ({} to {})", -size.mean, -size.high, -size.low)
    assert_said("tasks it is worth {} points", -size.mean)
    worst = worst_cv(records_of(MORE)["graphlora_no_normal"])
    dead = num_dead(MORE, "graphlora_no_normal")
    assert_said("Without it single blocks reach a CV of {} and {} experts died in 10", worst, dead)
    assert_said(
        "three tasks its {} points were a tie", -average(TABLE, "graphlora_no_normal").difference.mean
    )
    assert_said("Every block of the 10 runs is at or under {}", worst_cv(records_of(MORE)["graphlora"]))


def test_fresh_seeds():
    graph, matched = (average(FRESH, v).difference.mean for v in ("graphlora_no_graph", "lora_matched"))
    ten_graph, ten_matched = ten_seeds("graphlora_no_graph"), ten_seeds("lora_matched")
    p = [average(FRESH, v).t_p for v in ("graphlora_no_graph", "lora_matched")]
    assert_said("linear router: not confirmed.** {} points, the same sign as before, p {}.", -graph, p[0])
    assert_said("p 0.73. Over ten seeds it is {},", -ten_graph.mean)
    assert_said(
        "`graphlora`: not confirmed.** {} points, the same sign as before, corrected p {}.",
        matched,
        holm(p)[1],
    )
    assert_said("corrected p 0.52. Over ten seeds it is {},", ten_matched.mean)
    assert ten_graph.low < 0 < ten_graph.high and ten_matched.low < 0 < ten_matched.high
    assert_said("the graph is at most {} points better than a linear router", -ten_graph.low)
    assert_said("and at most {} worse", ten_graph.high)
    plain = on_task(FRESH, "lora", "arc_easy")
    assert_said("not asked about, ties again ({})", average(FRESH, "lora").difference.mean)
    size = plain.difference
    assert_said(
        "it is {} points below ({} to {}, corrected p {}", -size.mean, -size.high, -size.low, plain.holm_p
    )
    assert_said("fresh seeds: the worst block has {},", worst_cv(records_of(FRESH)["graphlora"]))


def test_the_readme_and_the_deviations():
    means = {v: fmean(scores_of(found).values()) for v, found in records_of(TABLE).items()}
    trained = [mean for variant, mean in means.items() if variant != "base"]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    told = (means["base"], min(trained), max(trained))
    assert_said("from {}% to between {}% and {}%", *told, page=page)
    told = (means["graphlora"], means["lora"], means["mixlora"])
    assert_said("plain LoRA of a third of its size ({} and {}), with MixLoRA ({})", *told, page=page)
    first, fresh = (average(study, "lora_matched") for study in (TABLE, FRESH))
    told = (means["lora_matched"], first.difference.mean)
    assert_said("own size ({}) wins** by {} points if the averages", *told, page=page)
    told = (over_averages(TABLE)["lora_matched"], len(compared(TABLE)[0]), first.holm_p)
    assert_said("(corrected p {}; over all {} tests {}, a tie)", *told, page=page)
    assert_said("where it was {} with p {}.", fresh.difference.mean, fresh.t_p, page=page)
    told = (means["hydralora"], means["loramoe_no_constraint"])
    assert_said("above HydraLoRA ({}) and LoRAMoE without its constraint ({})", *told, page=page)
    assert_said("alone above LoRAMoE too ({})", means["loramoe"], page=page)
    assert_said("loss is worth {} points", -average(MORE, "graphlora_no_normal").difference.mean, page=page)
    challenge = on_task(MORE, "lora_matched", "arc_challenge").difference.mean
    assert_said("is {} points above it on ARC-Challenge", challenge, page=page)
    page = (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8")
    worst = [worst_cv(records_of(study)["graphlora"]) for study in (TABLE, MORE, FRESH)]
    told = (
        worst[0],
        len(records_of(MORE)["graphlora"]) + len(records_of(FRESH)["graphlora"]),
        max(worst[1:]),
    )
    assert_said("CV was {}, in {} more on two other tasks and fresh seeds {}.", *told, page=page)
