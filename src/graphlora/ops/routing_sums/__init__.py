"""Sums over tokens that the coordination losses need, for the FFN blocks of a model together."""

from graphlora.ops.routing_sums.reference import RoutingSums, routing_sums_torch

__all__ = ["RoutingSums", "routing_sums_torch"]
