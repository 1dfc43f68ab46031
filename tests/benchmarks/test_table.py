"""The target table, the pictures and the page say what the data say."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.__main__ import chosen_cases, main
from benchmarks.measurement import Measurement, append, latest_attempts, read
from benchmarks.registry import SUITES
from benchmarks.table import step_table, target_table, verdicts
from benchmarks.targets import TARGETS

from benchmarks import page, runner
from graphlora.errors import GraphLoraError

ROOT = Path(__file__).parents[2]
CASES = [case for case in SUITES["step"].cases if " 8 layers " in case.name]


def times(**values: float) -> list[Measurement]:
    """The same times of the given candidates in both step cases."""
    return [
        Measurement("step", case.name, name, "full", value=value, attempt=case.name, params=dict(case.params))
        for case in CASES
        for name, value in values.items()
    ]


def verdict(row: str, measurements: list[Measurement]):
    return next(v for v in verdicts(measurements) if v.target.row == row)


@pytest.mark.parametrize(("ours", "text"), [(80, "goal met"), (95, "must met"), (101, "**missed**")])
def test_a_ratio_is_held_to_must_and_goal(ours, text):
    found = verdict("3", times(triton_r16=ours, peft_bfloat16_r16=100))
    assert found.worst == pytest.approx(ours / 100)
    assert found.text == text
    assert f"{ours / 100:.3f} to {ours / 100:.3f}; 2 of 2" in target_table(
        times(triton_r16=ours, peft_bfloat16_r16=100)
    )


def test_the_worst_case_counts_and_missing_cases_show():
    measurements = times(triton_r16=80, peft_bfloat16_r16=100)
    slow = [
        replace(m, value=120.0) if m.candidate == "triton_r16" and m.case == CASES[1].name else m
        for m in measurements
    ]
    assert verdict("3", slow).text == "**missed**"
    assert verdict("3", measurements[:2]).text == "goal met so far"
    assert verdict("3", []).text == "not measured"


def test_a_failed_candidate_is_no_success():
    measurements = times(triton_r16=80, peft_bfloat16_r16=100)
    measurements[2] = replace(measurements[2], value=None, status="failed", error="RuntimeError: x")
    assert verdict("3", measurements).text == "**failed** in part"


def test_what_is_not_installed_is_not_measured_and_no_failure():
    peer = "moe_peft_mixlora_r8"
    measurements = times(triton_dropout_r8=1, **{peer: 4})
    (target,) = (t for t in TARGETS if t.against == peer)

    def text(found: list[Measurement]) -> str:
        return next(v for v in verdicts(found) if v.target is target).text

    assert text(measurements) == "goal met"
    for status, expected in (("skipped", "not measured"), ("failed", "failed")):
        without = [
            replace(m, value=None, status=status, error="x") if m.candidate == peer else m
            for m in measurements
        ]
        assert text(without) == expected


@pytest.mark.parametrize(
    ("times_of", "worst"),
    [({"eager_r8": 4, "loop_r8": 5}, 0.25), ({"eager_r8": 5, "loop_r8": 4}, 0.25), ({"eager_r8": 4}, None)],
)
def test_the_faster_of_two_counts_once_both_are_there(times_of, worst):
    (target,) = (t for t in TARGETS if t.against == ("eager_r8", "loop_r8") and t.candidate == "triton_r8")
    (found,) = (v for v in verdicts(times(triton_r8=1, **times_of)) if v.target is target)
    assert found.worst == worst


def test_ratios_never_mix_two_attempts():
    fast_base = [replace(m, attempt="later", created="2030") for m in times(peft_bfloat16_r16=1)]
    assert verdict("3", [*times(triton_r16=80, peft_bfloat16_r16=100), *fast_base]).worst is None


def test_a_failed_attempt_does_not_hide_a_measured_one():
    failed = [replace(m, value=None, status="failed", attempt="later", created="2030") for m in times(all=1)]
    assert verdict("3", [*times(triton_r16=80, peft_bfloat16_r16=100), *failed]).worst == pytest.approx(0.8)


def test_every_target_has_cases_and_every_row_is_there():
    assert {target.row for target in TARGETS} == {str(row) for row in range(1, 13)}
    for found in verdicts([]):
        assert found.expected > 0, found.target.what


def test_the_whole_matrix_is_registered():
    found = {
        tuple(case.params[key] for key in ("shape", "r", "tokens", "skew")) for case in SUITES["ffn"].cases
    }
    assert len(found) == len(SUITES["ffn"].cases) == 2 * 3 * 3 * 2


def test_resuming_takes_the_missing_first_then_the_failed():
    first, second = CASES
    third = SUITES["router"].cases[0]
    failed = Measurement("step", first.name, "triton_r16", "full", status="failed", attempt="a")
    done = Measurement("step", second.name, "triton_r16", "full", value=1.0, attempt="b")
    assert runner.missing_cases([first, second, third], [failed, done]) == [third, first]
    assert runner.missing_cases([second], [replace(done, tiny=True)]) == [second]


def test_a_cut_last_line_is_left_out_and_a_broken_one_is_named(tmp_path):
    append(tmp_path / "a.jsonl", times(frozen=1))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"suite": "st')
    assert read([tmp_path]) == times(frozen=1)
    (tmp_path / "b.jsonl").write_text('{"what": 1}\n')
    with pytest.raises(GraphLoraError, match=r"b.jsonl:1: not a measurement"):
        read([tmp_path])


def test_figures_and_page_come_from_the_data(tmp_path):
    names = {name: 1.0 + i / 10 for i, name in enumerate(page.LABELS)}
    ffn = [
        Measurement("ffn", case.name, name, phase, value=value, attempt=case.name, params=dict(case.params))
        for case in SUITES["ffn"].cases
        for name, value in (("frozen", 10.0), ("triton", 11.0))
        for phase in ("forward", "backward", "full")
    ]
    rates = [
        Measurement("step", "llama3-8b all layers 8x1024", name, "tokens_per_second", value=1e4)
        for name in ("frozen", "frozen_compiled", "triton_r16", "triton_r16_compiled", "triton_r8")
    ]
    append(tmp_path / "data" / "a.jsonl", [*times(**names), *ffn, *rates])
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "performance.md").write_text((ROOT / "docs" / "performance.md").read_text())
    assert main(["figures", "--results", str(tmp_path / "data"), "--docs", str(docs)]) == 0
    assert {path.name for path in (docs / "images").iterdir()} == {
        "targets.png",
        "step_time.png",
        "throughput.png",
        "ffn_matrix.png",
    }
    pairs = {"frozen model": (1e4, 1e4), "GraphLoRA r=16": (1e4, 1e4)}
    assert page._rates(read([tmp_path / "data"])) == {"llama3-8b all layers 8x1024": pairs}
    text = (docs / "performance.md").read_text()
    assert "| 1 | FFN forward + backward / frozen FFN, r <= 8 | 1.100 |" in text
    assert "| 7 | router forward + backward, T = 8192, CUDA graph | - | 0 of 2 |" in text
    again = text
    page.update_page(read([tmp_path / "data"]), docs / "performance.md")
    assert (docs / "performance.md").read_text() == again


def test_an_mfu_does_not_gain_from_a_gpu_that_had_slowed_down():
    """The peak is the fastest product of all cases, not the one behind the case's own steps."""

    def case(name: str, peak: float) -> list[Measurement]:
        share = Measurement(
            "step", name, "frozen", "mfu", value=9.9, extra={"flops": 3e12, "peak_flops": peak}
        )
        return [Measurement("step", name, "frozen", "full", value=10.0), share]

    text = step_table(case("cold", 6e14) + case("hot", 4e14))
    assert text.count("| 50.0% |") == 2


def test_every_candidate_of_a_step_has_a_label_of_its_own_in_the_picture():
    for case in SUITES["step"].cases:
        values = {name: 1.0 + i for i, name in enumerate(case.params["candidates"])}
        group = [Measurement("step", case.name, name, "full", value=v) for name, v in values.items()]
        found = page._step_ratios(group).get(case.name)
        if "eager_r8" not in values:
            assert found is None
            continue
        assert len(found) == len(values)
        assert sorted(found.values()) == sorted(values.values())
        assert found.get("GraphLoRA r=8, compiled") == values.get("triton_r8_compiled")


def test_the_page_says_which_commit_measured_what_and_names_no_folder_of_a_machine():
    provenance = {
        "commit": "0123456789",
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "command": "python -m benchmarks run --resume --commit 0123456789 --out /some/place --cases '^step'",
    }
    sources = page._sources([replace(m, provenance=provenance) for m in times(frozen=1)])
    assert sources == (
        "- 0123456, NVIDIA H200, torch 2.11.0, triton 3.6.0: step\n  - `python -m benchmarks run --cases '^step'`"
    )


def test_a_page_without_a_marker_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(GraphLoraError, match="begin targets"):
        page.update_page(times(frozen=1), tmp_path / "page.md")


def test_rows_are_chosen_by_number_suite_and_pattern(capsys):
    assert {case.suite for case in chosen_cases("1,7", None, tiny=False)} == {"ffn", "router"}
    assert [case.name for case in chosen_cases("full", "qwen2.*all layers", tiny=False)] == [
        "qwen2-7b all layers 8x1024"
    ]
    assert main(["list", "--rows", "99"]) == 2
    assert "'99' is unknown" in capsys.readouterr().err


def test_listing_and_tables_need_no_torch():
    code = (
        "import sys; from benchmarks.__main__ import main; import benchmarks.page, benchmarks.table; main(['list']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_only_the_useful_attempt_of_a_case_is_kept():
    older = times(frozen=1)
    newer = [replace(m, value=2.0, attempt="new", created="2030") for m in older]
    assert {m.value for group in latest_attempts([*newer, *older]).values() for m in group} == {2.0}
