"""Records of an invented study, with the shape of real ones, to test reports with."""

import random

from graphlora.records import RunRecord

COMMIT = "a" * 40
# Variant: (mean gain over the base in points, spread over seeds, trained parameters in millions, expert layout)
METHODS = {
    "lora": (17.0, 0.6, 4.9, None),
    "lora_matched": (18.4, 0.7, 14.6, None),
    "mixlora": (18.9, 1.0, 14.2, 1.05),
    "graphlora": (19.8, 0.45, 14.7, 0.16),
    "graphlora_no_graph": (19.2, 0.6, 14.2, 0.2),
    "graphlora_no_poisson": (19.5, 0.5, 14.7, 0.18),
    "graphlora_no_normal": (19.0, 0.9, 14.7, 0.85),
}
BASES = {"arc_easy": 46.7, "boolq": 41.1, "social_iqa": 42.5}


def study_record(
    variant,
    task,
    seed,
    score,
    *,
    study="table1",
    commit=COMMIT,
    dirty=False,
    minutes=0,
    config=None,
    **metrics,
):
    """One record; `score` in percent."""
    result = {"acc": score / 100 - 0.01, "acc_norm": score / 100, "acc_stderr": 0.01, "num": 1000}
    return RunRecord(
        kind="study",
        run_id=f"{study}-{variant}-{task}-{seed}-{minutes}",
        created=f"2026-01-01T{minutes // 60:02}:{minutes % 60:02}:00+00:00",
        config={"method": "graphlora", "task": task, "seed": seed, **(config or {})},
        config_hash="0" * 16,
        metrics={"task": task, "test": {task: result}, "metric": "acc_norm", "score": score / 100} | metrics,
        provenance={
            "commit": commit,
            "dirty": dirty,
            "versions": {"torch": "2.11.0", "peft": "0.21.0"},
            "python": "3.12.0",
            "platform": "Linux",
        },
        model="models/tiny-135M",
        seed=seed,
        device="invented",
        dtype="bfloat16",
        wall_time=60.0,
        peak_memory=10 * 2**30,
        data_hash=f"{task}{seed}",
        study=study,
        variant=variant,
    )


def table_records(methods=METHODS, tasks=BASES, seeds=range(5)):
    """A study of methods on tasks with everything that a record may hold."""
    draw = random.Random(7)
    records = [study_record("base", task, 0, score) for task, score in tasks.items()]
    for variant, (gain, spread, millions, imbalance) in methods.items():
        for task, base in tasks.items():
            for seed in seeds:
                score = base + gain + draw.gauss(0, spread)
                extra = {
                    "method": "lora" if imbalance is None else "graphlora",
                    "num_trained": int(millions * 1e6),
                    "step_time": 0.1 + millions / 100 + 0.2 * (imbalance is not None),
                    "tokens_per_second": 60_000 / (1 + millions / 20 + (imbalance is not None)),
                    "train_seconds": 45.0,
                    "steps": 140,
                    "curve": _curve(draw, score),
                }
                if imbalance is not None:
                    extra["routing"] = _routing(draw, imbalance)
                records.append(study_record(variant, task, seed, score, **extra))
    return records


def sweep_records(seeds=range(5), tasks=BASES):
    """A study that changes one setting of the reference at a time."""
    draw = random.Random(3)
    settings = {"num_experts": 8, "top_k": 2, "r": 8, "lora_alpha": 16, "edge_density": 0.1, "graph_seed": 0}
    settings["edge_init"] = "random"
    changes = {"graphlora": {}}
    changes |= {f"experts_{n}": {"num_experts": n} for n in (4, 12, 16, 32)}
    changes |= {f"top_{k}": {"top_k": k} for k in (1, 3, 4, 5)}
    changes |= {f"rank_{r}": {"r": r, "lora_alpha": 2 * r} for r in (1, 2, 4, 16, 32)}
    changes |= {f"density_{d}": {"edge_density": d / 100} for d in (20, 40, 60, 80)}
    changes |= {f"edges_{s}": {"graph_seed": s} for s in (1, 2, 3, 4)}
    changes |= {f"edges_{kind}": {"edge_init": kind} for kind in ("none", "ring", "complete", "learned")}
    records = []
    for variant, change in changes.items():
        shift = draw.gauss(-0.4, 0.6) if change else 0.0
        for task, base in tasks.items():
            for seed in seeds:
                score = base + 19 + shift + draw.gauss(0, 0.6)
                records.append(
                    study_record(variant, task, seed, score, study="sensitivity", config=settings | change)
                )
    return records


def write_records(records, folder):
    """The records as files, a folder per study."""
    for record in records:
        record.write(folder / str(record.study) / f"{record.run_id}.json")
    return folder


def _curve(draw, score):
    points = []
    for step in range(10, 141, 10):
        done = 1 - 0.97 ** (step / 2)
        points.append({"step": step, "loss": 1.1 - 0.5 * done - score / 500 + draw.gauss(0, 0.02)})
        if step % 30 == 10:
            share = (score - 15 * (1 - done) + draw.gauss(0, 0.5)) / 100
            points[-1] |= {"eval_loss": points[-1]["loss"] + 0.05, "eval_acc_norm": share}
    return points


def _routing(draw, imbalance):
    blocks = {}
    for layer in range(12):
        cv = abs(imbalance * (0.6 + 0.05 * layer) + draw.gauss(0, 0.1 * imbalance))
        loads = [max(0.0, (1 + cv * draw.gauss(0, 1)) / 8) for _ in range(8)]
        blocks[f"model.layers.{layer}.mlp"] = {
            "expert_load": [load / sum(loads) for load in loads],
            "entropy": max(0.3, 1 - 0.2 * cv + draw.gauss(0, 0.01)),
            "dead_experts": sum(load == 0 for load in loads),
            "load_cv": cv,
            "tie_rate": abs(draw.gauss(0.01, 0.004)) * (1 + imbalance),
            "expert_overlap": min(1.0, abs(draw.gauss(0.12, 0.02)) + 0.05 * imbalance),
        }
    return blocks
