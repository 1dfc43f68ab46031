"""Which records count: kinds, commits, dirty trees, repetitions, damaged files."""

import dataclasses

import pytest
from study_records import COMMIT, study_record, write_records

from graphlora.errors import GraphLoraError
from graphlora.report.names import file_name
from graphlora.report.reading import read_studies

OTHER = "b" * 40


def seeds_of(study):
    return sorted(run.seed for run in study.runs)


def test_records_of_another_commit_and_of_a_dirty_tree_are_left_out_and_counted(tmp_path):
    records = [study_record("lora", "quiz", seed, 50) for seed in range(3)]
    records += [
        study_record("lora", "quiz", 3, 50, commit=OTHER),
        study_record("lora", "quiz", 4, 50, dirty=True),
    ]
    write_records(records, tmp_path)
    (study,), broken = read_studies(tmp_path)
    assert seeds_of(study) == [0, 1, 2]
    assert not broken
    assert [note.split(" left out")[0] for note in study.notes] == [
        "1 record from a tree with uncommitted changes",
        "1 record of other commits than aaaaaaaaaa",
    ]
    (study,), _ = read_studies(tmp_path, include_dirty=True, all_commits=True)
    assert seeds_of(study) == [0, 1, 2, 3, 4]
    assert [run.seed for run in study.runs if run.marked] == [3, 4]
    assert "2 records marked †" in study.notes[-1]


def test_the_usual_commit_is_that_of_most_clean_records_and_of_the_newest_where_they_are_even(tmp_path):
    records = [study_record("lora", "quiz", seed, 50, commit=OTHER, dirty=True) for seed in range(3)]
    records += [
        study_record("lora", "quiz", 3, 50),
        study_record("lora", "quiz", 4, 50, commit=OTHER, minutes=9),
    ]
    write_records(records, tmp_path)
    assert read_studies(tmp_path)[0][0].commit == OTHER
    write_records([study_record("lora", "quiz", 5, 50)], tmp_path)
    assert read_studies(tmp_path)[0][0].commit == COMMIT


def test_of_two_records_of_one_run_the_newer_counts(tmp_path):
    write_records([study_record("lora", "quiz", 0, score, minutes=score) for score in (60, 50)], tmp_path)
    (study,), _ = read_studies(tmp_path)
    assert [run.scores("test") for run in study.runs] == [{"quiz": 0.6}]
    assert "1 record left out where a newer one" in study.notes[0]


def test_damaged_files_are_skipped_and_named_and_others_are_none_of_its_business(tmp_path):
    write_records([study_record("lora", "quiz", 0, 50)], tmp_path)
    (tmp_path / "table1" / "cut.json").write_text('{"schema_version": 1, "ki')
    (tmp_path / "table1" / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "table1" / ".work").mkdir()
    (tmp_path / "table1" / ".work" / "half.json").write_text("{")
    dataclasses.replace(study_record("lora", "quiz", 1, 50), kind="training").write(
        tmp_path / "training.json"
    )
    dataclasses.replace(study_record("lora", "quiz", 2, 50), variant=None).write(tmp_path / "odd.json")
    (study,), broken = read_studies(tmp_path)
    assert seeds_of(study) == [0]
    assert len(broken) == 2
    assert "odd.json: a study's record without study or variant" in broken[0]
    assert "cut.json: broken JSON" in broken[1]


def test_failures_are_kept_until_the_run_succeeds(tmp_path):
    def failure(seed):
        record = dataclasses.replace(study_record("lora", "quiz", seed, 50), kind="study-failure")
        return dataclasses.replace(
            record, run_id=f"failure{seed}", metrics={"task": "quiz", "error": "no memory"}
        )

    write_records([study_record("lora", "quiz", 0, 50), failure(0), failure(1)], tmp_path)
    (study,), _ = read_studies(tmp_path)
    assert [record.seed for record in study.failures] == [1]


def test_uneven_devices_and_data_are_noted(tmp_path):
    one = study_record("lora", "quiz", 0, 50)
    two = dataclasses.replace(study_record("dora", "quiz", 0, 50), device="another", data_hash="else")
    write_records([one, two], tmp_path)
    (study,), _ = read_studies(tmp_path)
    assert "The runs used several devices: another, invented." in study.notes
    assert "Variants were trained on different data (data_hash) for: quiz." in study.notes


def test_a_study_that_never_saw_the_test_split_is_read_on_validation(tmp_path):
    record = study_record("lora", "quiz", 0, 50)
    metrics = dict(record.metrics)
    metrics["validation"] = metrics.pop("test")
    write_records([dataclasses.replace(record, metrics=metrics)], tmp_path)
    assert read_studies(tmp_path)[0][0].split == "validation"


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(GraphLoraError, match="there is no folder"):
        read_studies(tmp_path / "nowhere")
    with pytest.raises(
        GraphLoraError, match=r"no records of a study in .*; make some with: graphlora study run"
    ):
        read_studies(tmp_path)
    write_records([study_record("lora", "quiz", 0, 50, dirty=True)], tmp_path)
    with pytest.raises(
        GraphLoraError, match="all 1 records of table1 come from a tree with uncommitted changes"
    ):
        read_studies(tmp_path)
    with pytest.raises(GraphLoraError, match=r"no study 'ablation' in .*; there are: table1"):
        read_studies(tmp_path, study="ablation")


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/b", "..", "a\nb"])
def test_a_study_whose_name_would_lead_its_files_elsewhere_is_skipped(name, tmp_path):
    write_records([study_record("lora", "quiz", 0, 50)], tmp_path)
    (tmp_path / "table1" / "other.json").write_text(study_record("lora", "quiz", 1, 50, study=name).to_json())
    studies, broken = read_studies(tmp_path)
    assert [study.name for study in studies] == ["table1"]
    assert "is no name" in broken[0]


def test_names_of_files_stay_in_their_folder():
    assert (
        file_name("table1-scores-meta-llama/../../Llama 3.1+x")
        == "table1-scores-meta-llama_.._.._Llama_3.1+x"
    )
