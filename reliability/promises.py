"""The promises, in the order of the table. A record's own text replaces the sentence here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One row of the table.

    Attributes:
        topic: Heading it stands under.
        name: Name of its record, `results/reliability/NAME.json`.
        text: What is promised, for as long as there is no record.
        command: Module and arguments of what measures it, below `reliability`; left out: its name.
        by_hand: The line that measures it on a machine with GPUs; `run` tells it instead of running anything.
    """

    topic: str
    name: str
    text: str
    command: str = ""
    by_hand: str = ""


SCALE, CRASH, NUMBERS = "Many processes and large data", "Crash safety", "Numerical safety"
FILES, REPEAT, RELEASE = "Untrusted files", "Reproducibility", "Compatibility and supply chain"

PROMISES = (
    Promise(SCALE, "two_processes", "Two processes (DDP and FSDP2) follow the same loss curve as one."),
    Promise(
        SCALE, "resume_other_processes", "A run resumes on another number of processes.", "two_processes"
    ),
    Promise(SCALE, "loading_once", "A base never exists twice in memory."),
    Promise(SCALE, "loading_memory", "No process holds the whole base beside its part of it."),
    Promise(
        SCALE,
        "two_gpus",
        "Two GPUs follow the loss curve of one, and are almost twice as fast.",
        by_hand="torchrun --nproc_per_node 2 -m reliability.two_gpus",
    ),
    Promise(
        SCALE,
        "two_gpus_curve",
        "Two GPUs follow the loss curve of one in float32 too.",
        by_hand="torchrun --nproc_per_node 2 -m reliability.two_gpus --parts curve,curve_float32 --out "
        "results/reliability/two_gpus_curve.json",
    ),
    Promise(SCALE, "streaming", "Data of any size are read in bounded memory."),
    Promise(SCALE, "stream_resume", "A run over streamed data resumes in the middle of an epoch."),
    Promise(CRASH, "kills", "A killed run resumes and ends with the same weights."),
    Promise(CRASH, "kills_ddp", "A killed run of two processes resumes and ends with the same weights."),
    Promise(CRASH, "study_kills", "A killed study goes on and ends with the records of an undisturbed one."),
    Promise(
        CRASH,
        "study_kills_gpu",
        "A study killed on a GPU ends with the same runs, with scores within the spread of seeds.",
        by_hand="python -m reliability.study_kills --device cuda --model PATH --data_dir DIR",
    ),
    Promise(CRASH, "study_ray", "A study on a Ray cluster that loses a worker ends with the same records."),
    Promise(
        CRASH, "disasters", "A full disk, lost data and SIGTERM end in a message and a usable checkpoint."
    ),
    Promise(
        CRASH, "out_of_memory", "Memory that runs out ends in a line with settings and what each would save."
    ),
    Promise(NUMBERS, "nonfinite", "A loss that is not finite names its batch and layer."),
    Promise(NUMBERS, "float32_routing", "Routers and losses compute in float32 under autocast."),
    Promise(NUMBERS, "ties", "Ties are broken the same way on every rank and path."),
    Promise(
        FILES, "fuzz_adapter_config", "No adapter configuration crashes or allocates.", "fuzz adapter_config"
    ),
    Promise(FILES, "fuzz_safetensors", "No adapter file crashes.", "fuzz safetensors"),
    Promise(FILES, "fuzz_study_yaml", "No study file crashes.", "fuzz study_yaml"),
    Promise(FILES, "fuzz_recipe_yaml", "No recipe crashes.", "fuzz recipe_yaml"),
    Promise(FILES, "fuzz_data", "No data file crashes.", "fuzz data"),
    Promise(FILES, "fuzz_authors", "No checkpoint of the authors crashes.", "fuzz authors"),
    Promise(FILES, "bombs", "Small files that ask for endless memory are refused before it is taken."),
    Promise(REPEAT, "repeatable", "The same seed gives the same adapter, bit for bit, on one device."),
    Promise(
        REPEAT,
        "repeatable_gpu",
        "The same seed gives the same adapter, bit for bit, on a GPU too.",
        by_hand="python -m reliability.repeatable --device cuda",
    ),
    Promise(
        REPEAT,
        "repeatable_gpu_models",
        "The same on a GPU for models of other sizes, in bfloat16.",
        by_hand="python -m reliability.repeatable --device cuda --model PATH [PATH ...]",
    ),
    Promise(REPEAT, "deterministic_cost", "Deterministic mode costs little."),
    Promise(
        REPEAT,
        "deterministic_cost_gpu",
        "What it costs on a GPU.",
        by_hand="python -m reliability.deterministic_cost --device cuda",
    ),
    Promise(
        REPEAT, "verify", "`graphlora verify` finds every changed byte and reproduces a recorded output."
    ),
    Promise(RELEASE, "versions", "The tests pass with the oldest and the newest supported versions."),
    Promise(RELEASE, "wheel", "The wheel works in a clean environment, with its types and data."),
)
