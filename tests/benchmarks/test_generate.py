"""The suite `generate`: what a CPU skips, and that compiled candidates do not disturb each other."""

import pytest
import torch
from benchmarks.candidates.models import model_config, random_tokens
from benchmarks.context import Context, Gate
from benchmarks.registry import SUITES
from benchmarks.shapes import TINY
from benchmarks.suites import generate
from benchmarks.table import others_table
from transformers import CompileConfig

from graphlora.benchmark.random_model import random_model

CPU = torch.device("cpu")


@pytest.fixture
def found():
    context = Context(SUITES["generate"].tiny[0], CPU, torch.float32, True, Gate({torch.float32: []}))
    generate.measure(context)
    return context.finished()


def test_a_cpu_measures_the_default_cache_and_skips_compilation(found):
    timed = {(m.candidate, m.phase): m.value for m in found if m.status == "ok"}
    names = ("frozen", "triton", "peft")
    assert set(timed) == {(name, phase) for name in names for phase in ("full", "tokens_per_second")}
    for name in names:
        # 2 answers of 4 tokens.
        assert timed[name, "tokens_per_second"] == pytest.approx(8e3 / timed[name, "full"])
    skipped = {m.candidate: m.error for m in found if m.status == "skipped"}
    assert skipped == {f"{name}_compiled": "transformers compiles generation on a GPU" for name in names}
    assert not [m for m in found if m.status == "failed"]


def test_the_page_shows_speeds_and_skips(found):
    table = others_table(found)
    assert "| generate | tiny 2 layers batch2 | peft | tokens_per_second |" in table
    assert "| frozen_compiled | full | skipped: transformers compiles" in table


# Dynamo of torch 2.13 makes an instance of the function it traces and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_each_candidate_compiles_one_graph_and_answers_as_uncompiled():
    base = random_model(model_config(TINY, 1), CPU, torch.float32)
    ids = random_tokens(TINY, 2, 6, CPU)
    config = generate.settings(4)
    compiled = generate.settings(4)
    compiled.compile_config = CompileConfig(backend="eager", mode=None)
    vars(compiled.compile_config)["_compile_all_devices"] = True
    with generate.compilations_kept():
        plain = [generate.generation_of(name, base, ids, config) for name in ("frozen", "peft", "torch")]
        made = [
            generate.generation_of(f"{name}_compiled", base, ids, compiled)
            for name in ("frozen", "peft", "torch")
        ]
        for _ in range(2):
            for generation in (*plain, *made):
                generation()
        assert [generation.graphs for generation in (*plain, *made)] == [0, 0, 0, 1, 1, 1]
        answers = [generation.generate() for generation in made]
    assert all(answer.shape == (2, 6 + 4) for answer in answers)
    for answer, uncompiled in zip(answers, plain, strict=True):
        assert torch.equal(answer, uncompiled.generate())


def test_more_versions_than_by_default_stay_compiled():
    """Else what runs uncompiled would be timed as compiled."""

    def changing(x, words):
        return x * len(words)

    limit = torch._dynamo.config.recompile_limit
    before, _ = generate._compiled()
    with generate.compilations_kept():
        function = torch.compile(changing, backend="eager")
        for length in range(limit + 2):
            function(torch.ones(1), "x" * length)
        assert generate._compiled()[0] - before == limit + 2
    assert torch._dynamo.config.recompile_limit == limit
