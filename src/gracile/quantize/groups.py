"""A scale for each few inputs of each output: finer than one per channel, for weights alone.

Group-wise quantization of Shen et al. 2020, arXiv:1909.05840 (Q-BERT), with groups along the inputs
as ONNX stores them (DequantizeLinear of opset 21, `block_size`). What an integer kernel sums must
have one scale, so such a weight is multiplied in float: what it saves is bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Size, Tensor

from gracile.errors import BindError
from gracile.graph.graph import Graph
from gracile.nn.rounding import fake_quantize
from gracile.quantize.affine import quantize
from gracile.quantize.grid import Params, WeightGrid
from gracile.quantize.observers.base import Observer
from gracile.quantize.placement import Placement, WeightSpec

GROUPED_OPS = ("conv", "linear")  # whose weight has all inputs of an output in a row


def in_groups(weight: Tensor, size: int) -> Tensor:
    """A weight with one row for each group: `size` inputs in a row of one output.

    Args:
        weight: (O, I, ...); its inputs are those of I times the places of the kernel.
        size: divides their number.

    Returns:
        (O * groups, size), a view where that can be.

    >>> in_groups(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2)
    tensor([[1., 2.],
            [3., 4.]])
    """
    return weight.reshape(-1, size)


def on_groups(weight: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """A weight on the grids of its groups, as floats, with `fake_quantize`'s gradients.

    Args:
        weight: (O, I, ...).
        scale, zero_point: (O, groups).
        qmin, qmax: the grid's ends.

    >>> on_groups(torch.tensor([[0.4, 0.9, 40.0, 90.0]]), torch.tensor([[0.5, 50.0]]),
    ...           torch.zeros(1, 2, dtype=torch.int32), -7, 7)
    tensor([[ 0.5000,  1.0000, 50.0000, 100.0000]])
    """
    rows = in_groups(weight, weight.numel() // scale.numel())
    return fake_quantize(rows, scale, zero_point, qmin, qmax, 0).reshape(weight.shape)


def kept_groups(keep: Sequence[int], of: int, groups: int, size: int) -> Tensor | None:
    """Which groups are left when input channels go, in order; None if they are other groups now.

    Args:
        keep: input channels that are left, rising.
        of: input channels there were.
        groups: of each output.
        size: inputs in a group.

    >>> kept_groups([0, 1, 4, 5], of=6, groups=3, size=2), kept_groups([0, 2], 4, 2, 2)
    (tensor([0, 2]), None)
    """
    places = torch.arange(groups * size).reshape(of, -1)[list(keep)].flatten()
    if len(places) % size:
        return None
    rows = places.reshape(-1, size) // size
    first = rows[:, 0]
    whole = torch.equal(rows, first.unsqueeze(1).expand_as(rows))
    return first if whole and len(first.unique()) == len(first) else None


def grouped(
    placement: Placement,
    graph: Graph,
    shapes: Mapping[str, Size],
    size: int,
    same: Mapping[str, str],
) -> tuple[Placement, dict[str, str]]:
    """Give weights a scale for each group of inputs, where their inputs are whole groups.

    Args:
        placement: of all quantizers.
        graph: it was made for.
        shapes: address -> shape of the weight.
        size: inputs in a group.
        same: other names of tied weights -> the one that is placed.

    Returns:
        The placement, and address -> why of the weights that keep one scale per output channel.

    Raises:
        BindError: none of them can.
    """
    users: dict[str, list[str]] = {}
    for node in graph:
        for address in node.params.values():
            users.setdefault(same.get(address, address), []).append(node.op)
    whole = {}
    for spec in placement.weights:
        other = [op for op in users.get(spec.address, ()) if op not in GROUPED_OPS]
        inputs = shapes[spec.address][1:].numel()
        if other:
            whole[spec.address] = f"'{other[0]}' reads it"
        elif inputs % size:
            whole[spec.address] = f"its {inputs} inputs are no whole groups of {size}"
    if len(whole) == len(placement.weights):
        address, why = next(iter(whole.items()))
        raise BindError(
            f"no selected weight can have a scale for each {size} inputs: '{address}': {why}. "
            "Choose a group_size that divides the inputs (those of a convolution are input "
            "channels times places of the kernel), or leave it out."
        )
    weights = tuple(
        w if w.address in whole else replace(w, axis=0, group=size) for w in placement.weights
    )
    return replace(placement, weights=weights), whole


class GroupedGrid(WeightGrid):
    """The grid of a weight with a scale for each group: scale and zero point are (O, groups)."""

    def __init__(
        self, spec: WeightSpec, make_observer: Callable[[], Observer], make_params: Params
    ):
        super().__init__(spec, make_observer, make_params)
        assert spec.group is not None
        self.size = spec.group

    def fresh(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each group."""
        scale, zero_point = super().fresh(in_groups(weight, self.size))
        return scale.reshape(len(weight), -1), zero_point.reshape(len(weight), -1)

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as it is after dequantizing."""
        return on_groups(weight, *self.params(weight), self.qmin, self.qmax)

    def integers(self, weight: Tensor) -> Tensor:
        """The weight on its grid, as integers less their zero point."""
        scale, zero_point = self.params(weight)
        rows = in_groups(weight, self.size)
        q = quantize(rows, scale.flatten(), zero_point.flatten(), self.qmin, self.qmax, 0)
        return (q - zero_point.reshape(-1, 1)).reshape(weight.shape)

    def keep_inputs(self, keep: Sequence[int], of: int) -> None:
        """Input channels were removed: only these of so many are left.

        Groups of which all inputs are left keep their scales if they are still groups. Otherwise
        the groups are others, and all scales are found anew from the weight.
        """
        if self.scale is None or self.zero_point is None:
            return
        left = kept_groups(keep, of, self.scale.shape[1], self.size)
        if left is None:
            self.scale = self.zero_point = None
        else:
            self.scale, self.zero_point = self.scale[:, left], self.zero_point[:, left]
