"""What a run will cost, from the records of like runs."""

from dataclasses import replace

from graphlora.records import RunRecord
from graphlora.study.estimate import Estimator
from graphlora.study.plan import make_runs
from graphlora.study.spec import load_spec


def test_memory_is_what_like_runs_took_from_the_gpu():
    """Processes that share a GPU share what each has taken from it; what it uses of that at its peak is less."""
    runs = [run for run in make_runs(load_spec("smoke")) if run.variant != "base"]
    done, like = runs[0], next(run for run in runs[1:] if run.variant == runs[0].variant)
    record = RunRecord.create("study", {}, {}, wall_time=10.0, peak_memory=4e9, device="NVIDIA H200")
    assert Estimator(runs, {done.run_id: record}, on_gpu=True)(like).memory == 4e9
    taken = replace(record, metrics={"peak_reserved": 12e9})
    found = Estimator(runs, {done.run_id: taken}, on_gpu=True)(like)
    assert (found.memory, found.seconds, found.source) == (12e9, 10.0, "records")
    assert found.device == "NVIDIA H200", "time on another machine is said to be that"


def test_the_rule_says_for_which_device_it_is():
    run = make_runs(load_spec("smoke"))[-1]
    on_cpu, on_gpu = (Estimator([], {}, on_gpu=on_gpu)(run) for on_gpu in (False, True))
    assert (on_cpu.device, on_gpu.device) == ("a CPU of this machine", "a GPU of this machine")
    assert on_cpu.seconds > on_gpu.seconds
