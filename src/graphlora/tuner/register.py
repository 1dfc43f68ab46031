"""The only place that touches PEFT's enumeration of methods.

PEFT keeps its methods in a closed `str` enumeration; `register_peft_method` refuses names outside it. Extending it in
place gives GraphLoRA the same standing as the built-in methods: membership, attribute, `PeftType("GRAPHLORA")`, JSON
and pickle.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

from packaging.version import Version
from peft.utils.peft_types import PeftType, register_peft_method

PEFT_NAME = "GRAPHLORA"
PREFIX = "graphlora_"
# Saving, loading and injection are hooked by name (BaseTuner._get_adapter_state_dict and friends), as of this version.
MINIMUM_PEFT = "0.21.0"


def check_peft_version() -> None:
    """Raises ImportError where PEFT is older than the version whose internals registration relies on."""
    found = importlib.metadata.version("peft")
    if Version(found) < Version(MINIMUM_PEFT):
        raise ImportError(f"graphlora needs peft >= {MINIMUM_PEFT}, found {found}; run: pip install -U peft")


def graphlora_peft_type() -> PeftType:
    """`PeftType.GRAPHLORA`, added to the enumeration on first use."""
    if PEFT_NAME not in PeftType.__members__:
        check_peft_version()
        member = str.__new__(PeftType, PEFT_NAME)
        member._name_ = PEFT_NAME
        member._value_ = PEFT_NAME
        PeftType._member_names_.append(PEFT_NAME)
        PeftType._member_map_[PEFT_NAME] = member
        PeftType._value2member_map_[PEFT_NAME] = member
        type.__setattr__(PeftType, PEFT_NAME, member)
    return PeftType(PEFT_NAME)


def register() -> None:
    """Makes PEFT know `GraphLoraConfig` and `GraphLoraModel`; safe to call twice."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    peft_type = graphlora_peft_type()
    if peft_type in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    from graphlora.tuner.config import GraphLoraConfig
    from graphlora.tuner.model import GraphLoraModel

    register_peft_method(
        name=PEFT_NAME.lower(), config_cls=GraphLoraConfig, model_cls=GraphLoraModel, prefix=PREFIX
    )
    _keep_model_card_on_push()


def _keep_model_card_on_push() -> None:
    """Makes `push_to_hub` of a GraphLoRA adapter upload the card that `save_pretrained` writes.

    transformers puts a fresh card of its own over the saved one just before the upload; other methods are left alone.
    """
    from peft import PeftModel

    from graphlora.tuner.card import describe_in_model_card

    upload = PeftModel._upload_modified_files

    @functools.wraps(upload)
    def upload_with_card(self: PeftModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get("default", next(iter(self.peft_config.values())))
        if getattr(config, "peft_type", None) == PEFT_NAME:
            self.create_or_update_model_card(working_dir)
            describe_in_model_card(config, working_dir)  # pyright: ignore[reportArgumentType]
        return upload(self, working_dir, *args, **kwargs)

    PeftModel._upload_modified_files = upload_with_card
