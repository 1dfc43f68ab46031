#!/usr/bin/env bash
# Tests the package with the oldest or the newest versions of its dependencies, in an environment of its own.
#
#   scripts/compat.sh oldest [PYTHON]     the lowest versions that pyproject.toml allows (.ci/oldest.txt)
#   scripts/compat.sh newest [PYTHON]     the newest versions on the package index
#   scripts/compat.sh locked [PYTHON]     the versions of constraints.txt
#
# VENV=DIR keeps the environment there (and finds it the next time); TORCH_INDEX_URL as in the Makefile. Tests that need
# optional packages skip. The versions that were installed come first in the output, pytest's summary last.
set -euo pipefail

cd "$(dirname "$0")/.."
which=${1:-}
python=${2:-python3}
case "$which" in
  # The interpreter of Triton 3.6, the oldest torch's, cannot read results of NumPy 2.4.
  oldest) pins=(-r .ci/oldest.txt "numpy<2.4") ;;
  newest) pins=(--upgrade) ;;
  locked) pins=(-c constraints.txt) ;;
  *) echo "usage: scripts/compat.sh oldest|newest|locked [PYTHON]" >&2; exit 2 ;;
esac
unset PYTHONPATH VIRTUAL_ENV

# What breaks when a dependency changes: PEFT's and transformers' seams, Trainer, files, the command line, what a compiler
# can trace. Kernels in Triton's interpreter are left to `make test`.
tests=(
  tests/paper tests/parity tests/invariants tests/test_autoregister.py tests/test_records.py
  tests/tuner/test_adapters.py tests/tuner/test_card.py tests/tuner/test_compile.py tests/tuner/test_config.py
  tests/tuner/test_families.py tests/tuner/test_shared_input.py
  tests/tuner/test_ffn.py tests/tuner/test_heads_and_devices.py tests/tuner/test_import_authors.py
  tests/tuner/test_methods.py tests/tuner/test_model.py tests/tuner/test_precision.py tests/tuner/test_register.py
  tests/tuner/test_save_and_load.py
  tests/training/test_arguments.py tests/training/test_data.py tests/training/test_determinism.py
  tests/training/test_loading.py tests/training/test_packing.py tests/training/test_recipe.py
  tests/training/test_run.py tests/training/test_trainer.py tests/trainers/test_transformers_trainer.py
  tests/evaluation/test_multiple_choice.py tests/evaluation/test_run.py tests/tasks
  tests/cli/test_main.py tests/cli/test_train.py tests/cli/test_use.py tests/cli/test_verify.py
)

if [ -n "${VENV:-}" ]; then venv=$VENV; else venv=$(mktemp -d); trap 'rm -rf "$venv"' EXIT; fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
[ -z "${TORCH_INDEX_URL:-}" ] || pip+=(--extra-index-url "$TORCH_INDEX_URL")
"${pip[@]}" "${pins[@]}" -e . pytest hypothesis tensorboard
"$venv/bin/python" - <<'PY'
import platform
from importlib.metadata import version

names = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "jsonargparse")
print("compat:", "python", platform.python_version(), *(f"{name} {version(name)}" for name in names))
PY
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= \
  "$venv/bin/python" -m pytest -q -p no:cacheprovider -m 'not slow and not weekly and not gpu and not real_model' "${tests[@]}" ${PYTEST_ARGS:-}
