"""Training in two processes (gloo), with the base whole (DDP) and sharded (FSDP2), is training in one."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel
from reliability.launching import EFFICIENT, FSDP, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graphlora.cli.accelerate import config_files
from graphlora.errors import GraphLoraError
from graphlora.records import RunRecord
from graphlora.training import Recipe, train
from graphlora.training.processes import check_launch, wants_sharding

ROWS_PER_STEP, STEPS = 8, 4
# Seconds that the processes may take.
TIMEOUT = 300.0
GRAPHLORA = {"method": "graphlora", "num_experts": 4, "top_k": 2, "router_hidden_size": 16}
# Sums over two halves are rounded in another order than sums over the whole.
TOLERANCE = 2e-5


class Runs:
    """Recipes of the same training, for one process and for two."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.data = folder, model, data

    def recipe(self, name: str, method: str, processes: int = 1, **changes) -> dict:
        """Eight rows of unequal length per step, half at a time; an odd number of rows to validate on."""
        options = {
            "model": str(self.model),
            "task": str(self.data),
            "output_dir": str(self.folder / name),
            "dtype": "float32",
            "r": 4,
            "lora_alpha": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "per_device_train_batch_size": ROWS_PER_STEP // 2 // processes,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "eval_steps": 2,
            "eval_limit": 3,
            "load_best_model_at_end": False,
            "logging_steps": 1,
            "training_args": {"use_cpu": True, "disable_tqdm": True},
        }
        return options | (GRAPHLORA if method == "graphlora" else {"method": "lora"}) | changes


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, choices_file) -> Runs:
    return Runs(tmp_path_factory.mktemp("processes"), tiny_model, choices_file)


@pytest.fixture(scope="module")
def two(runs) -> dict[str, list[dict]]:
    """What two processes saw of all cases; one start serves all tests."""
    one = runs.recipe("one first", "graphlora", max_steps=2)
    train(Recipe.from_dict(one))
    # Comes first: accelerate is told only once per process whether there is an accelerator.
    untold = runs.recipe("untold", "graphlora", 2, training_args={"disable_tqdm": True})
    cases: list[dict] = [{"name": "untold", "recipe": untold}]
    for method in ("lora", "graphlora"):
        cases += [
            {"name": f"ddp {method}", "recipe": runs.recipe(f"ddp {method}", method, 2)},
            {
                "name": f"fsdp {method}",
                "recipe": runs.recipe(f"fsdp {method}", method, 2),
                "environment": FSDP,
            },
        ]
    cases += [
        {"name": "ended", "recipe": runs.recipe("ddp graphlora", "graphlora", 2), "resume": True},
        {
            "name": "efficient",
            "recipe": runs.recipe("efficient", "graphlora", 2),
            "environment": EFFICIENT,
        },
        {
            "name": "from one",
            "recipe": one | {"max_steps": STEPS, "per_device_train_batch_size": 2},
            "resume": True,
            "environment": FSDP,
        },
        {
            "name": "first",
            "recipe": runs.recipe("first", "graphlora", 2, max_steps=2),
            "environment": FSDP,
        },
        {
            "name": "other rows",
            "recipe": one | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            "resume": True,
        },
        {
            "name": "on cpus",
            "recipe": runs.recipe("on cpus", "lora", 2),
            "environment": FSDP | {"AS_ON_CPUS": "1"},
        },
    ]
    return start(cases, runs.folder / "seen", 2, TIMEOUT)


@pytest.fixture(scope="module")
def one(runs) -> dict:
    """The same runs in this process."""
    return {
        method: train(Recipe.from_dict(runs.recipe(f"one {method}", method)))
        for method in ("lora", "graphlora")
    }


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((value - second[name]).abs().max()) <= tolerance * scale, name


def trained_tokens(metrics: dict) -> int:
    return round(metrics["tokens_per_second"] * metrics["train_seconds"])


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "graphlora"])
def test_two_processes_learn_what_one_learns(runs, two, one, way, method):
    """With accumulation and rows of unequal length: labels and tokens are counted over both processes."""
    expected = [entry["loss"] for entry in one[method].history if "loss" in entry]
    for rank in two[f"{way} {method}"]:
        assert rank["losses"] == pytest.approx(expected, rel=TOLERANCE)
        # The loss on unequal rows is a mean of batches' means in Trainer, so it depends on how they are split.
        for name in rank["metrics"].keys() - {"eval_loss"}:
            assert rank["metrics"][name] == pytest.approx(one[method].metrics[name], rel=TOLERANCE), name
    output = runs.folder / f"{way} {method}"
    assert_close(one[method].output_dir, output, 10 * TOLERANCE)
    recorded = RunRecord.read(output / "record.json").metrics
    assert trained_tokens(recorded) == trained_tokens(one[method].metrics), "those of all processes"


def test_without_an_accelerator_they_train_together_without_being_told(runs, two):
    """Left to itself, accelerate would make a run of each, and both would write the same files."""
    for name in ("losses", "norms", "checksum"):
        assert [rank[name] for rank in two["untold"]] == [rank[name] for rank in two["ddp graphlora"]]
    assert_close(runs.folder / "untold", runs.folder / "ddp graphlora", 0.0)


def test_a_run_that_has_ended_trains_no_further_in_any_process(two):
    for rank, before in zip(two["ended"], two["ddp graphlora"], strict=True):
        assert rank["losses"] == before["losses"]
        assert rank["checksum"] == before["checksum"]
        assert rank["metrics"] == before["metrics"]


@pytest.mark.parametrize("name", ["ddp lora", "ddp graphlora", "fsdp lora", "fsdp graphlora", "efficient"])
def test_the_adapter_is_the_same_in_both_processes(two, name):
    first, second = two[name]
    assert first["checksum"] == second["checksum"]
    assert first["norms"] == second["norms"]


def test_the_base_is_sharded_and_the_adapter_is_not(two):
    for rank in two["fsdp graphlora"]:
        assert rank["sharded"] > 10
        assert rank["sharded_adapter"] == 0
        assert rank["values_here"] < 0.75 * rank["values"]
    assert {rank["sharded"] for rank in two["ddp graphlora"]} == {0}


def test_one_process_reads_the_weights_and_nothing_changes(runs, two):
    for name in ("losses", "norms", "metrics", "checksum", "sharded", "values_here"):
        assert [r[name] for r in two["efficient"]] == [r[name] for r in two["fsdp graphlora"]]
    assert_close(runs.folder / "efficient", runs.folder / "fsdp graphlora", 0.0)


@pytest.mark.slow
def test_quantized_bases_and_modules_trained_in_full_can_be_sharded(runs):
    """NF4 weights, kept as values of the dtype that FSDP shards; DoRA and an output layer of the adapter's own."""
    kinds = {
        "4bit": ("graphlora", {"load_in_4bit": True}, FSDP),
        "head": ("lora", {"modules_to_save": ["lm_head"], "use_dora": True}, EFFICIENT),
        "checkpointing": ("graphlora", {"gradient_checkpointing": True}, EFFICIENT),
    }
    cases = []
    for name, (method, changes, environment) in kinds.items():
        for way, variables in ((f"{name} whole", {}), (name, environment)):
            recipe = runs.recipe(way, method, 2, **changes)
            cases.append({"name": way, "recipe": recipe, "environment": variables})
    found = start(cases, runs.folder / "seen more", 2, TIMEOUT)
    for name in kinds:
        assert found[name][0]["sharded"] > 10
        assert [rank["losses"] for rank in found[name]] == [rank["losses"] for rank in found[f"{name} whole"]]
        assert_close(runs.folder / f"{name} whole", runs.folder / name, 0.0)


def test_what_two_processes_saved_loads_in_one(runs, two, one):
    base = AutoModelForCausalLM.from_pretrained(runs.model)
    loaded = PeftModel.from_pretrained(base, runs.folder / "fsdp graphlora").eval()
    ids = torch.arange(4, 20)[None]
    ours = one["graphlora"].model.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    written = {path.name for path in (runs.folder / "fsdp graphlora").iterdir()}
    assert written == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "config.yaml", "record.json", "manifest.json",
        "checkpoints",
    }  # fmt: skip


def test_a_run_goes_on_with_another_number_of_processes(runs, two, one):
    """From one to two and from two to one; both end where the run in one process ends."""
    expected = [entry["loss"] for entry in one["graphlora"].history if "loss" in entry]
    assert two["from one"][0]["losses"] == pytest.approx(expected, rel=TOLERANCE)
    assert_close(runs.folder / "one graphlora", runs.folder / "one first", 10 * TOLERANCE)
    recipe = runs.recipe("first", "graphlora")
    result = train(Recipe.from_dict(recipe), resume=True)
    assert [entry["loss"] for entry in result.history if "loss" in entry] == pytest.approx(
        expected, rel=TOLERANCE
    )
    assert_close(runs.folder / "one graphlora", runs.folder / "first", 10 * TOLERANCE)


def test_a_run_goes_on_with_the_same_rows_per_step_only(two):
    for rank in two["other rows"]:
        assert "its steps take 8 rows (2 x 2 x 2), now 32 rows (2 x 4 x 4)" in rank["error"]
        assert "set gradient_accumulation_steps to 1" in rank["error"]


def test_sharding_where_accelerate_does_not_shard_is_an_error(two):
    for rank in two["on cpus"]:
        assert "accelerate shards models on GPUs only, not on cpu" in rank["error"]


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed is not supported.*graphlora accelerate fsdp2"),
        (FSDP | {"FSDP_VERSION": "1"}, {}, "FSDP version 1 is not supported; set fsdp_version: 2"),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {}, "NO_WRAP.*TRANSFORMER_BASED_WRAP"),
        (
            FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "set gradient_checkpointing to true in the recipe",
        ),
        (FSDP, {"step_mode": "compile"}, "step_mode is compile.*set step_mode to eager"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(monkeypatch, environment, options, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = Recipe.from_dict({"model": "m", "task": "t", "output_dir": "o"} | options)
    with pytest.raises(GraphLoraError, match=message):
        check_launch(recipe)


@pytest.mark.parametrize("name", sorted(config_files()))
def test_accelerate_understands_the_configs_of_the_package(monkeypatch, name):
    """Its launcher turns each into the environment that the processes get."""
    words = ["--config_file", str(config_files()[name]), "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.num_processes == 2
    environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    recipe = Recipe.from_dict({"model": "m", "task": "t", "output_dir": "o"})
    check_launch(recipe)
    assert wants_sharding() == (name != "ddp")
    assert environment.get("FSDP_OFFLOAD_PARAMS") == (
        None if name == "ddp" else str(name == "fsdp2_offload").lower()
    )
