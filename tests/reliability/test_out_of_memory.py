"""A real failed allocation."""

import re

import pytest
from reliability.out_of_memory import make_recipe, train_limited


@pytest.mark.weekly
def test_a_failed_allocation_ends_in_settings_that_help(tmp_path):
    recipe = make_recipe(tmp_path)
    failed = train_limited(recipe)
    assert failed.returncode == 2, failed.stderr[-2000:]
    assert "Traceback" not in failed.stderr
    line = failed.stderr.strip().splitlines()[-1]
    assert re.search(
        r"the machine is out of memory; a step of this run takes about 0\.\d GB by prediction; set", line
    )
    for name in ("per_device_train_batch_size to 16", "gradient_checkpointing to true", "max_length to 152"):
        assert re.search(rf"{name}[^(]*(\([a-z ]*\) )?\(about 0\.\d+ GB less\)", line), line
    small = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8", "--overwrite"]
    followed = train_limited(recipe, *small)
    assert followed.returncode == 0, followed.stderr[-2000:]
