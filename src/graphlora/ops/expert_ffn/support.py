"""Which blocks the Triton kernels of the expert FFN support; asked where Triton may not be installed."""

from __future__ import annotations

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
MOST_EXPERTS, MOST_CHOICES, HIGHEST_RANK = 64, 8, 64


def unsupported(
    gated: bool, act: str, num_experts: int, top_k: int, r: int, hidden_dropout: bool
) -> str | None:
    """What the kernels do not support of a block, as the end of a sentence; None where they do all.

    Args:
        gated: whether the block has a gate projection.
        act: name of its activation; `DifferentiableAct.name` where it is known.
        num_experts: N.
        top_k: K.
        r: rank.
        hidden_dropout: whether the base model drops out between activation and down projection.
    """
    if not gated:
        return "FFN blocks without a gate"
    if act not in ACTIVATIONS:
        return f"the activation {act}"
    if num_experts > MOST_EXPERTS or top_k > MOST_CHOICES or r > HIGHEST_RANK:
        return f"more than {MOST_EXPERTS} experts, top_k over {MOST_CHOICES} or r over {HIGHEST_RANK}"
    return "the base model's own dropout inside the FFN" if hidden_dropout else None
