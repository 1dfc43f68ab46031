"""Which compute path runs, and what is said where it is not the one that was hoped for."""

import warnings

import pytest

from graphlora.errors import GraphLoraError
from graphlora.ops import backend
from graphlora.ops.backend import resolve_backend


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that the kernels were measured on."""
    monkeypatch.setattr(backend, "_is_measured_gpu", lambda _: True)
    monkeypatch.setattr(backend, "_triton_problem", lambda _: None)
    backend._warn_once.cache_clear()


def test_auto_takes_the_kernels_where_they_were_measured(hopper):
    assert resolve_backend("auto", "cuda") == "triton"


def test_auto_falls_back_with_one_warning(hopper):
    with pytest.warns(UserWarning, match=r"do not support r = 65; using the fused PyTorch path"):
        assert resolve_backend("auto", "cuda", "r = 65") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", "cuda", "r = 65") == "torch"


def test_auto_says_nothing_on_a_cpu():
    assert resolve_backend("auto", "cpu", "r = 65") == "torch"


def test_kernels_that_were_asked_for_are_refused_with_the_reason(hopper):
    with pytest.raises(GraphLoraError, match=r"do not support r = 65; use backend='auto'"):
        resolve_backend("triton", "cuda", "r = 65")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(GraphLoraError, match="'cuda' is unknown; choose one of auto, eager, torch, triton"):
        resolve_backend("cuda")
