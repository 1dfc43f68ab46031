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
    overlaps,
    records_of,
    routers,
    scores_of,
    worst_cv,
)

from graphlora.report.aggregate import stability
from graphlora.report.inference import holm, summarize

TABLE, MORE, FRESH = "table1_small", "table1_small_more", "graph_small"


def average(study, variant):
    return compared(study)[1][variant]


def on_task(study, variant, task):
    (found,) = (c for c in compared(study)[0] if (c.variant, c.column) == (variant, task))
    return found


def of_averages(study):
    """p values corrected over the averages alone."""
    found = compared(study)[1]
    return dict(zip(found, holm([c.t_p for c in found.values()]), strict=True))


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
    matched = average(TABLE, "lora_matched").holm_p
    assert_said("`table1_small` has {}; before", 4 * 13)
    assert_said("corrected p of {}, 0.068 and 0.051", matched)
    values = of_averages(TABLE)
    assert_said("Over the {} averages of today alone", len(values))
    assert_said("alone it would be {}, a win over GraphLoRA", values["lora_matched"])
    assert_said("and LoRAMoE's {}, a loss to it", values["loramoe"])


def test_plain_lora_of_equal_size():
    found = [average(study, "lora_matched").difference.mean for study in (TABLE, MORE, FRESH)]
    assert_said("({}, {} and {} points); none of the three holds", *found)
    easy, challenge = (
        on_task(TABLE, "lora_matched", "arc_easy"),
        on_task(MORE, "lora_matched", "arc_challenge"),
    )
    assert_said("a lead of {} points on ARC-Challenge", challenge.difference.mean)
    first = average(TABLE, "lora_matched")
    assert_said("win over it: {} points on average (corrected p {})", first.difference.mean, first.holm_p)
    size = easy.difference
    assert_said(
        "ARC-Easy ({}, interval {} to {}, corrected p {})", size.mean, size.low, size.high, easy.holm_p
    )
    size = challenge.difference
    told = (size.mean, size.low, size.high, challenge.holm_p)
    assert_said("wins over GraphLoRA: {} points ({} to {}, corrected p {})", *told)


def test_the_other_methods():
    found = {v: (-c.difference.mean, c.holm_p) for v, c in compared(TABLE)[1].items()}
    assert_said("by {} points (corrected p {})", *found["hydralora"])
    assert_said("constraint: GraphLoRA wins**, by {} ({})", *found["loramoe_no_constraint"])
    assert_said("as large, {} points (corrected p {})", *found["loramoe"])
    assert_said("({} points below, the interval below zero, corrected p {})", *found["mola"])
    assert_said("({} below, the interval holds zero)", found["ming_moe"][0])
    mola, ming_moe = (average(TABLE, variant).difference for variant in ("mola", "ming_moe"))
    assert mola.high < 0 < ming_moe.high
    records = records_of(TABLE)
    lora = mean_by_seed(records["lora"])
    beaten = [
        summarize(differences(mean_by_seed(records[v]), lora)) for v in ("hydralora", "loramoe_no_constraint")
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
    assert_said("averages alone are counted ({}).", of_averages(MORE)["mixlora"])
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
    assert_said("ties** with plain LoRA ({} and {})", means["graphlora"], means["lora"], page=page)
    told = (means["lora_matched"], means["mixlora"])
    assert_said("of its own size ({}), with MixLoRA ({})", *told, page=page)
    told = (means["hydralora"], means["loramoe_no_constraint"])
    assert_said("above HydraLoRA ({}) and LoRAMoE without its constraint ({})", *told, page=page)
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
