"""The integers behind quantized weights, carried through BatchNorm folding without a change."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from gracile.core.plan import Bits, Plan
from gracile.errors import UserError

CONTAINER_BITS = 8  # what every runtime here stores; fewer bits use part of the range


@dataclass(frozen=True)
class WeightGrid:
    """A weight as (q - zero_point) * scale.

    Attributes:
        q: integers, in the weight's own layout.
        scale: > 0, one value or one per index of `axis`.
        zero_point: integers of scale's shape.
        axis: None for one scale.
        group: a scale for each so many inputs of an output; scales are (O, groups) then.
        signed: int8 rather than uint8.
        bits: how many of the 8 are used.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    signed: bool
    bits: int = CONTAINER_BITS
    group: int | None = None

    def floats(self) -> Tensor:
        """The weight's values, float32."""
        scale = _spread(self.scale, self.axis, self.q.shape, self.group).float()
        zero = _spread(self.zero_point, self.axis, self.q.shape, self.group)
        return (self.q - zero).float() * scale


@dataclass
class Weights:
    """Weights of a plan that a runtime can take as integers, and the reasons for the others."""

    grids: dict[str, WeightGrid]
    floats: dict[str, str]


def weight_grids(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    scaled: Mapping[str, tuple[Tensor, int]],
) -> Weights:
    """The integers of every weight with a Bits edit, as they are after BatchNorm folding.

    Args:
        plan: its Bits edits of role "weight" are read.
        tensors: ``<key>.scale`` and ``<key>.zero_point`` of each edit.
        weights: address -> dequantized values before folding.
        scaled: address -> (factor per output channel, axis of output channels) where a BatchNorm
            was folded.

    Raises:
        UserError: a scale is missing, or a weight does not lie on its grid.
    """
    out = Weights({}, {})
    for edit in plan.of_kind("bits"):
        if edit.role != "weight" or edit.at not in weights:
            continue
        if edit.bits > CONTAINER_BITS:
            out.floats[edit.at] = f"{edit.bits} bits do not fit the runtimes' 8-bit weights"
            continue
        if edit.bits == 1 and edit.axis == 1:
            out.floats[edit.at] = "each input channel has a scale of its own, which no kernel takes"
            continue
        grid = integers(weights[edit.at], edit, tensors)
        if edit.at in scaled:
            moved = folded(grid, edit, *scaled[edit.at])
            if isinstance(moved, str):
                out.floats[edit.at] = moved
                continue
            grid = moved
        if edit.group is None and grid.zero_point.numel() > 1 and len(grid.zero_point.unique()) > 1:
            out.floats[edit.at] = "its channels have different zero points, which no kernel takes"
            continue
        out.grids[edit.at] = grid
    return out


def integers(weight: Tensor, edit: Bits, tensors: Mapping[str, Tensor]) -> WeightGrid:
    """Recover q = round(w / scale) + zero_point from dequantized values.

    Raises:
        UserError: the scale is missing or has the wrong length, or the weight is off its grid by
            more than 1 % of a step.
    """
    try:
        scale = tensors[f"{edit.key}.scale"].detach().float().cpu()
        zero = tensors[f"{edit.key}.zero_point"].detach().to(torch.int32).cpu()
    except KeyError as e:
        raise UserError(f"'{edit.at}' has a Bits edit, but its tensor {e} is missing.") from None
    w = weight.detach().float().cpu()
    if edit.group is not None:
        if scale.shape != (w.shape[0], w.shape[1:].numel() // edit.group):
            raise UserError(
                f"'{edit.at}' of shape {tuple(w.shape)} needs a scale for each {edit.group} "
                f"inputs, but there are {tuple(scale.shape)}."
            )
    elif edit.axis is not None and scale.numel() != w.shape[edit.axis]:
        raise UserError(
            f"'{edit.at}' has {w.shape[edit.axis]} channels along axis {edit.axis}, but "
            f"{scale.numel()} scales."
        )
    axis = edit.axis if scale.numel() > 1 or edit.group is not None else None
    if edit.group is None:
        shape = () if axis is None else (-1,)
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    level = w / _spread(scale, axis, w.shape, edit.group)
    rounded = torch.round(level)
    q = (rounded + _spread(zero, axis, w.shape, edit.group)).to(torch.int32)
    off = float((level - rounded).abs().max()) if w.numel() else 0.0
    if off > 0.01 or int(q.min()) < edit.qmin or int(q.max()) > edit.qmax:
        raise UserError(
            f"'{edit.at}' does not lie on its {edit.bits}-bit grid (off by {off:.2g} steps, "
            f"integers {int(q.min())}..{int(q.max())}, allowed {edit.qmin}..{edit.qmax}); it was "
            "changed after it was quantized."
        )
    return WeightGrid(q, scale, zero, axis, edit.signed, edit.bits, edit.group)


def folded(grid: WeightGrid, edit: Bits, factor: Tensor, axis: int) -> WeightGrid | str:
    """Move a BatchNorm's factor into the scales: s' = s |f|, and q mirrored where f < 0.

    The integers stay as trained. A per-tensor scale becomes one per channel. Where f = 0 the
    channel's integers become zero points and its scale is kept, for a scale must not be 0.

    Args:
        grid: before folding.
        edit: gives the range of the integers.
        factor: gamma / sigma per output channel, (O,).
        axis: the weight's axis of output channels.

    Returns:
        The new grid, or the reason why there is none.
    """
    if grid.axis not in (None, axis) or factor.numel() != grid.q.shape[axis]:
        return "its scales do not lie along the output channels that BatchNorm scales"
    f = factor.double().cpu()
    channels = f.numel()
    columns = (channels, 1) if grid.group is not None else (channels,)
    wider = grid.scale.shape if grid.group is not None else (channels,)
    scale = grid.scale.double().expand(wider) * torch.where(f == 0, 1.0, f.abs()).reshape(columns)
    zero = grid.zero_point.expand(wider).clone()
    q = grid.q.clone()
    wide = [1] * q.ndim
    wide[axis] = channels
    negative, dead = (f < 0).reshape(wide), (f == 0).reshape(wide)
    mirror = 0 if not zero.any() else edit.qmin + edit.qmax  # q - z changes sign, range kept
    q = torch.where(negative, mirror - q, q)
    zero = torch.where((f < 0).reshape(columns), mirror - zero, zero)
    q = torch.where(dead, _spread(zero, axis, q.shape, grid.group).to(q.dtype), q)
    if int(q.max()) > edit.qmax or int(q.min()) < edit.qmin:
        return (
            f"a channel with negative BatchNorm weight uses {edit.qmin}, which has no mirror; "
            "quantize with a narrow range"
        )
    return WeightGrid(q, scale.float(), zero, axis, grid.signed, grid.bits, grid.group)


def _spread(values: Tensor, axis: int | None, shape: Size, group: int | None) -> Tensor:
    """Values of channels or groups, so that they broadcast over a weight of this shape."""
    if group is not None:
        return values.repeat_interleave(group, 1).reshape(shape)
    if axis is None:
        return values
    wide = [1] * len(shape)
    wide[axis] = -1
    return values.reshape(wide)
