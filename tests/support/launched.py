"""One process of several that train together on the CPU; runs the cases of a file one after the other.

Called as `python launched.py CASES.json FOLDER` with the environment that torchrun would give. A case is
`{"name", "recipe", "resume", "environment"}`; what the process saw of it goes to `FOLDER/NAME.RANK.json`.
"""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, train
from graphlora.training.measuring import peak_memory


def let_accelerate_shard_on_cpus() -> None:
    """accelerate takes FSDP up for processes of GPUs alone, although PyTorch's works on CPUs too."""
    original = PartialState.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not os.environ.get("AS_ON_CPUS"):
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


def checksum(model: torch.nn.Module) -> str:
    """Of the adapter's parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "graphlora_" in name or "lora_" in name:
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run(case: dict) -> dict:
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE", "AS_"))]:
        del os.environ[name]
    os.environ.update(case.get("environment", {}))
    try:
        result = train(Recipe.from_dict(case["recipe"]), resume=case.get("resume", False))
    except GraphLoraError as error:
        return {"error": str(error)}
    parameters = list(result.model.named_parameters())
    sharded = [name for name, parameter in parameters if isinstance(parameter, DTensor)]
    here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for _, p in parameters)
    return {
        "losses": [entry["loss"] for entry in result.history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in result.history if "grad_norm" in entry],
        "metrics": {name: value for name, value in result.metrics.items() if name.startswith("eval_")},
        "checksum": checksum(result.model),
        "sharded": len(sharded),
        "sharded_adapter": sum("lora_" in name for name in sharded),
        "values_here": here,
        "values": sum(p.numel() for _, p in parameters),
        "peak_memory": peak_memory(torch.device("cpu")),
    }


def main(cases: Path, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpus()
    rank = os.environ.get("RANK", "0")
    for case in json.loads(cases.read_text()):
        (folder / f"{case['name']}.{rank}.json").write_text(json.dumps(run(case)))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
