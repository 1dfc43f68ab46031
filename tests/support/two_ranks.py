"""One rank of two: runs every case of tests/trainers/test_two_processes.py and saves what the test compares.

Called as `python two_ranks.py FOLDER` with the environment that torchrun would give.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_llama import adapter_state, gradients, loads, make_batch, make_model
from tiny_trainers import run_sft, run_trainer
from torch.nn.parallel import DistributedDataParallel

LENGTHS = ([6, 3], [9, 4, 5])
EQUAL, UNEQUAL = [6] * 16, [6, 3, 9, 4, 7, 2, 5, 8, 3, 3, 6, 9, 4, 5, 8, 7]
POISSON_ONLY, NORMAL_ONLY = {"router_normal_loss_coef": 0.0}, {"router_poisson_loss_coef": 0.0}


def count_reductions() -> dict[str, int]:
    """Calls of all_reduce that one forward makes, by kind of forward."""
    calls = []
    original = dist.all_reduce
    model, batch = make_model(), make_batch([5, 3], 6, "left")
    prompt = {n: batch[n] for n in ("input_ids", "attention_mask")}
    counts = {}

    def counted(name, act):
        calls.clear()
        act()
        counts[name] = len(calls)

    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    counted("training", lambda: model.train()(**batch))
    counted("evaluation", lambda: model.eval()(**batch))
    with torch.no_grad():
        counted("no gradients", lambda: model.train()(**batch))
    counted("generation", lambda: model.generate(**prompt, max_new_tokens=3, do_sample=False))
    dist.all_reduce = original
    return counts


def unequal_ranks(rank: int, **config: float) -> dict:
    """Three steps with another batch size and another length on each rank; and the auxiliary loss's first gradient."""
    model = make_model(**config)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = {}
    for step in range(3):
        optimizer.zero_grad()
        batch = make_batch(LENGTHS[rank], seed=10 * step + rank)
        del batch["labels"]
        out = wrapped(**batch)
        out.aux_loss.backward()
        if step == 0:
            found = {"aux_loss": out.aux_loss.detach(), "loads": loads(model), "gradients": gradients(model)}
        optimizer.step()
    return {**found, "state": adapter_state(model)}


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    half = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    found = {"reductions": count_reductions(), "unequal": unequal_ranks(rank)}
    found["unequal normal"] = unequal_ranks(rank, **NORMAL_ONLY)
    steps, _, model = run_trainer(folder / "equal", EQUAL, **half)
    found["trainer"] = {"steps": steps, "state": adapter_state(model)}
    quarter = {**half, "per_device_train_batch_size": 1}
    found["accumulated"] = run_trainer(folder / "four", EQUAL, 4, config=POISSON_ONLY, **quarter)[0]
    for collator in ("padding", "packing"):
        found[collator] = run_trainer(folder / collator, UNEQUAL, 1, collator, **half)[0]
    eighth = {**half, "per_device_train_batch_size": 2}
    found["unequal accumulated"] = run_trainer(folder / "two", UNEQUAL, 2, **eighth)[0]
    found["sft"] = run_sft(folder / "sft", EQUAL, **half)[0]
    found["sft unequal"] = run_sft(folder / "sft unequal", UNEQUAL, **half)[0]
    found["sft accumulated"] = run_sft(folder / "sft4", EQUAL, 4, POISSON_ONLY, **quarter)[0]
    found["sft off"] = run_sft(folder / "off", EQUAL, router_aux_loss_coef=0.0, **half)[0]
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
