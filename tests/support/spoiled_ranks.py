"""One rank of two: trains on data of which one row has a token with a broken embedding; prints what it keeps.

Called under torchrun as `python spoiled_ranks.py RECIPE`.
"""

import sys
import warnings

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from graphlora.training import Recipe, train


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recipe = Recipe.from_yaml(path)
    result = train(recipe)
    state = torch.cat([t.flatten() for n, t in result.model.state_dict().items() if "lora" in n])
    everywhere = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, state)
    if dist.get_rank() == 0:
        saved = load_file(f"{recipe.output_dir}/adapter_model.safetensors")
        finite = all(torch.isfinite(t).all() for t in saved.values())
        sys.stdout.write(f"alike {all(torch.equal(e, state) for e in everywhere)} finite {finite}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
