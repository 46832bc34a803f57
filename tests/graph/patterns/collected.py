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
)
from patterns.base import ALL, Pattern

FAMILIES = (
    arithmetic, attention, concat_split, constants, convolution, embedding, functional,
    gates, norm, odd, recurrent, reshape, residual, several_inputs_outputs, shared_tied,
)  # fmt: skip

__all__ = ["ALL", "FAMILIES", "Pattern"]
