"""Registration with PEFT, in fresh processes: whichever is imported first."""

import subprocess
import sys

import pytest

CHECK = """
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft import PeftType
assert PeftType("GRAPHLORA") in PEFT_TYPE_TO_TUNER_MAPPING, list(PEFT_TYPE_TO_TUNER_MAPPING)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import graphlora, peft",
        "import peft, graphlora",
        "from graphlora import GraphLoraConfig",
        "import graphlora, importlib.util; importlib.util.find_spec('peft'); import peft",
    ],
)
def test_peft_knows_the_method(imports):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", imports + CHECK], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_package_itself_imports_neither_peft_nor_torch():
    check = "import graphlora, sys; assert not {'peft', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
