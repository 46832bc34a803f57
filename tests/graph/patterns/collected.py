"""All patterns, from the families."""

from patterns import (
    arithmetic,
    attention,
    concat_split,
    constants,
    convolution,
    embedding,
    functional,
    gates,
    norm,
    odd,
    recurrent,
    reshape,
    residual,
    several_inputs_outputs,
    shared_tied,
    weights,
)
from patterns.base import ALL, Pattern

FAMILIES = (
    arithmetic, attention, concat_split, constants, convolution, embedding, functional,
    gates, norm, odd, recurrent, reshape, residual, several_inputs_outputs, shared_tied, weights,
)  # fmt: skip

__all__ = ["ALL", "FAMILIES", "Pattern"]
