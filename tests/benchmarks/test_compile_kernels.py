"""The expert FFN's kernels compile for an H200 here, where there is none, and keep their numbers in registers."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_SCRIPT = """
import dataclasses, json
from benchmarks.compile_kernels import compile_kernel
cases = [
    ("forward_kernel", 64, 64, 4, 3, "bf16", {}),
    ("token_gradient_kernel", 64, 32, 4, 3, "bf16", {"r": 16}),
    ("weight_gradient_kernel", 32, 64, 4, 2, "fp16", {"ACT": "gelu_tanh", "EVEN": False, "WIDE": True}),
    ("forward_kernel", 64, 32, 4, 3, "fp32", {"UNIFORM": False, "K": 3, "KP": 4, "N": 20, "DROPOUT": True}),
]
print(json.dumps([dataclasses.asdict(compile_kernel(*c[:6], **c[6])) for c in cases]))
"""


def test_kernels_compile_without_spilling():
    """In a process of its own: here, Triton only interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert all(one["registers"] > 32 for one in found)
    assert [one["spilled"] for one in found[:3]] == [0, 0, 0]
    assert all(0 < one["per_element"] < 70 for one in found[:3])
