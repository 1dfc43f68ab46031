"""From a recipe to the Trainer's arguments."""

import pytest
import torch

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe
from graphlora.training.arguments import training_arguments


def arguments(tmp_path, dtype=torch.float32, **options):
    values = {"model": "m", "task": "quiz", "output_dir": str(tmp_path), "metric_for_best_model": "acc"}
    return training_arguments(Recipe.from_dict(values | options), dtype)


def test_recipe_options_and_passthrough_reach_the_trainer(tmp_path):
    found = arguments(
        tmp_path, learning_rate=3e-4, warmup_ratio=0.1, eval_steps=50, training_args={"adam_beta2": 0.95}
    )
    assert found.learning_rate == 3e-4
    assert found.get_warmup_steps(100) == 10
    assert found.adam_beta2 == 0.95
    assert found.save_steps == found.eval_steps == 50
    assert found.load_best_model_at_end
    assert found.greater_is_better
    assert not found.logging_nan_inf_filter
    assert found.report_to == []


def test_batches_are_copied_to_a_gpu_while_it_works(tmp_path, monkeypatch):
    assert not arguments(tmp_path).accelerator_config.non_blocking
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert arguments(tmp_path).accelerator_config.non_blocking
    own = {"accelerator_config": {"even_batches": False}}
    found = arguments(tmp_path, training_args=own).accelerator_config
    assert found.non_blocking and not found.even_batches
    own = {"accelerator_config": {"non_blocking": False}}
    assert not arguments(tmp_path, training_args=own).accelerator_config.non_blocking
    file = tmp_path / "accelerator.json"
    file.write_text('{"even_batches": false}')
    own = {"accelerator_config": str(file)}
    assert not arguments(tmp_path, training_args=own).accelerator_config.even_batches
    own = {"accelerator_config": str(tmp_path / "missing.json")}
    with pytest.raises(GraphLoraError, match=r"missing\.json"):
        arguments(tmp_path, training_args=own)


def test_batches_made_by_one_process_for_all_are_refused(tmp_path):
    own = {"accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(GraphLoraError, match=r"dispatch_batches.*leave it out"):
        arguments(tmp_path, training_args=own)


def test_warmup_steps_win_over_the_ratio(tmp_path):
    assert arguments(tmp_path, warmup_ratio=0.1, warmup_steps=7).get_warmup_steps(100) == 7


def test_activation_checkpointing_is_not_reentrant(tmp_path):
    found = arguments(tmp_path, gradient_checkpointing=True)
    assert found.gradient_checkpointing
    assert found.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_a_schedule_that_lacks_its_options_is_refused_before_training(tmp_path):
    with pytest.raises(GraphLoraError, match=r"min_lr.*lr_scheduler_kwargs"):
        arguments(tmp_path, lr_scheduler_type="cosine_with_min_lr")
    options = {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    found = arguments(tmp_path, lr_scheduler_type="cosine_with_min_lr", training_args=options)
    assert found.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "constant", "constant_with_warmup", "reduce_lr_on_plateau"]
)
def test_schedules_without_options_are_taken(tmp_path, name):
    assert arguments(tmp_path, lr_scheduler_type=name).lr_scheduler_type == name


def test_without_validation_nothing_is_chosen(tmp_path):
    found = arguments(tmp_path, eval_strategy="no")
    assert not found.load_best_model_at_end
    assert found.save_strategy == "steps"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"training_args": {"adam_beta": 1}},
            "training_args.adam_beta is unknown to transformers; did you mean",
        ),
        ({"training_args": {"seed": 1}}, "give --seed"),
        (
            {"training_args": {"label_smoothing_factor": 0.1}},
            "not supported: it would replace the model's loss",
        ),
        ({"fp16": True, "training_args": {"use_cpu": True}}, "fp16 has no effect on a CPU; set it to false"),
        ({"lr_scheduler_type": "zigzag"}, "transformers refuses the recipe: zigzag"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    with pytest.raises(GraphLoraError) as raised:
        arguments(tmp_path, **options)
    assert message in str(raised.value)
