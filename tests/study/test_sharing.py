"""Records say how many workers of their study shared a device, without which speeds mean little."""

from types import SimpleNamespace

from graphlora.records import WORKERS, RunRecord
from graphlora.study.plan import make_runs
from graphlora.study.ray_engine import _Submission
from graphlora.study.records import StudyFolder, shared
from graphlora.study.runner import run_study
from graphlora.study.spec import read_spec


def test_workers_of_one_device_are_counted_and_no_more_than_start(study_values, tmp_path):
    policy = {**study_values["policy"], "max_steps": 1}
    spec = read_spec({**study_values, "policy": policy, "variants": {"lora": {"method": "lora"}}})
    runs, folder = [run for run in make_runs(spec) if run.variant == "lora"], StudyFolder(tmp_path)
    assert run_study(runs, folder, workers=5, tell=lambda line: None) == 0
    assert [record.provenance[WORKERS] for record in folder.records(runs).values()] == [2, 2]


def test_a_record_keeps_what_else_it_says_of_its_making():
    record = RunRecord.create("study", {}, {})
    made = shared(record, 3)
    assert made.provenance == {**record.provenance, WORKERS: 3}
    assert RunRecord.from_json(made.to_json()) == made
    assert RunRecord.from_json(record.to_json()) == record


def test_runs_placed_by_ray_say_it_too(study_values, tmp_path):
    record = RunRecord.create("study", {}, {})
    ray = SimpleNamespace(
        cluster_resources=lambda: {"GPU": 2},
        nodes=lambda: [{"Alive": True}],
        remote=lambda **needs: lambda function: SimpleNamespace(remote=lambda run, adapter: run["seed"]),
        wait=lambda refs, num_returns, timeout: (refs[:1], refs[1:]),
        get=lambda ref: (record.to_json(), ""),
    )
    runs = [run for run in make_runs(read_spec(study_values)) if run.variant == "lora"]
    folder = StudyFolder(tmp_path)
    _Submission(ray, runs, folder, 4, lambda line: None).run()
    assert {found.provenance[WORKERS] for found in folder.records(runs).values()} == {4}
