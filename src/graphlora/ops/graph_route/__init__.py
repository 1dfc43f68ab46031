"""Logits of the graph router (paper eq. 4): a message-passing network over the experts and one token."""

from graphlora.ops.graph_route.inputs import GraphWeights
from graphlora.ops.graph_route.reference import graph_logits_eager
from graphlora.ops.graph_route.torch import graph_logits_torch

__all__ = ["GraphWeights", "graph_logits_eager", "graph_logits_torch"]
