"""How variants, tasks and metrics are written, and in which order variants stand."""

from __future__ import annotations

import re
from collections.abc import Iterable

# In the order of the tables: the untouched model, plain LoRA and its relatives, mixtures, this method last.
VARIANTS = {
    "base": "base model",
    "lora": "LoRA",
    "lora_matched": "LoRA, matched size",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "loraplus": "LoRA+",
    "loramoe": "LoRAMoE",
    "ming_moe": "MING-MoE",
    "mola": "MoLA",
    "hydralora": "HydraLoRA",
    "dynmole": "DynMoLE",
    "ld_mole": "LD-MoLE",
    "mixlora": "MixLoRA",
    "graphlora": "GraphLoRA",
}
TASKS = {
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "boolq": "BoolQ",
    "boolq_no_passage": "BoolQ, no passage",
    "openbookqa": "OpenBookQA",
    "social_iqa": "SIQA",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "quiz": "quiz",
}
METRICS = {"acc_norm": "length-normalized accuracy", "acc": "accuracy", "loss": "loss"}
AVERAGE = "average"
# The studies that come with the package, in the order of a report.
STUDIES = ("table1", "ablation", "sensitivity", "efficiency", "edges")


def variant_label(variant: str) -> str:
    """How a variant is shown: `mixlora_wide` becomes `MixLoRA wide`."""
    if variant in VARIANTS:
        return VARIANTS[variant]
    for known in sorted(VARIANTS, key=len, reverse=True):
        if variant.startswith(f"{known}_"):
            return f"{VARIANTS[known]} {_words(variant[len(known) + 1 :])}"
    return _words(variant)


def _words(text: str) -> str:
    return text.replace("_", " ").replace("poisson", "Poisson")


def metric_label(metric: str) -> str:
    """Name of a metric with its unit."""
    return METRICS.get(metric, metric) + (", %" if is_share(metric) else "")


def is_share(metric: str) -> bool:
    """Whether a metric is a share of items, which is shown in percent; else it is a loss, and lower is better."""
    return metric != "loss"


def difference_unit(metric: str) -> str:
    """Unit of differences."""
    return "points" if is_share(metric) else "nats"


def task_label(task: str) -> str:
    """How a task is shown."""
    return TASKS.get(task, task)


def ordered_variants(variants: Iterable[str], reference: str | None) -> list[str]:
    """Variants in the order of the tables: known methods, then others, the reference before its own variations."""
    known = list(VARIANTS)

    def place(variant: str) -> tuple[int, int, list[tuple[int, int, str]]]:
        if variant == "base":
            return 0, 0, natural(variant)
        family = max(
            (name for name in known if variant == name or variant.startswith(f"{name}_")),
            key=len,
            default=None,
        )
        if variant == reference:
            return 2, 0, natural(variant)
        if family is None or family == "graphlora":
            return 3, 0, natural(variant)
        return 1, known.index(family), natural(variant)

    return sorted(set(variants), key=place)


def study_order(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Sort key of studies: the shipped ones first."""
    return (STUDIES.index(name) if name in STUDIES else len(STUDIES)), natural(name)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key in which `n4` comes before `n16`."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part
    ]


def listed(items: Iterable[object]) -> str:
    """`1, 2 and 3`."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def file_name(text: str) -> str:
    """The text as the name of a file in the folder where it is put: whatever a record says, it leads nowhere else."""
    return re.sub(r"[^\w.+-]+", "_", text)[:150]
