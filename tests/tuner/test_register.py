"""Registration: PEFT's enumeration knows the method, and an older PEFT is refused in one line."""

import json
import pickle

import pytest
from peft import PeftType

from graphlora import GraphLoraConfig
from graphlora.tuner import register


def test_the_enumeration_treats_the_method_as_its_own():
    member = GraphLoraConfig().peft_type
    assert member is PeftType("GRAPHLORA") is PeftType.GRAPHLORA
    assert member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"GRAPHLORA"'


def test_registering_twice_is_harmless():
    register.register()
    register.register()


@pytest.mark.parametrize("found", ["0.20.9", "0.19.0"])
def test_an_older_peft_is_refused_with_the_remedy(monkeypatch, found):
    monkeypatch.setattr(register.importlib.metadata, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"needs peft >= 0.21.0, found {found}; run: pip install -U peft"):
        register.check_peft_version()


def test_this_peft_is_new_enough():
    register.check_peft_version()
