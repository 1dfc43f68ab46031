"""Experts that are whole FFN blocks with their own low-rank deltas (paper eqs. 1, 2 and 5, `"ffn"` granularity)."""

from graphlora.ops.expert_ffn.inputs import ExpertWeights, FrozenFfn, LoraMasks, draw_masks
from graphlora.ops.expert_ffn.reference import expert_ffn_eager
from graphlora.ops.expert_ffn.torch import expert_ffn_torch

__all__ = ["ExpertWeights", "FrozenFfn", "LoraMasks", "draw_masks", "expert_ffn_eager", "expert_ffn_torch"]
