"""What every range observer is: shown tensor after tensor, it says which range to quantize."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from gracile.errors import GracileError


class Observer(ABC):
    """Watches a tensor over many batches and proposes the range [low, high] of its grid.

    `observe(x)` is called after each forward that computed x, `sync()` once all ranks have seen
    their part, `range()` when a scale is needed. Options are keyword-only arguments of `__init__`.

    Attributes:
        axis: the kept axis (one range per channel); None, the default, for one range per tensor.
            Set it before the first `observe`.
        bits, signed, symmetric, narrow: the grid the range is for, see `affine.qrange`; symmetric
            means zero point 0. Who clips by the error of the grid goes by them.
    """

    axis: int | None = None
    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    narrow: bool = False
    saved: ClassVar[tuple[str, ...]] = ("low", "high")  # tensors that make up the state

    low: Tensor | None = None
    high: Tensor | None = None

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take one more tensor into account; gradients are neither needed nor kept."""

    @abstractmethod
    def sync(self) -> None:
        """Make all ranks of a distributed training hold the same range."""

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), float32, shape () or (channels,).

        Raises:
            GracileError: nothing was observed, or the network computed NaN or infinity.
        """
        if self.low is None or self.high is None:
            raise GracileError(
                "this observer was shown no tensor: the operator never ran on the calibration data."
            )
        if not bool(torch.isfinite(self.low).all() and torch.isfinite(self.high).all()):
            raise GracileError(
                "the network computed NaN or infinity on the observed data; no range covers that."
            )
        return self.low, self.high

    @property
    def seen(self) -> bool:
        """Whether anything was observed."""
        return self.low is not None

    def state_dict(self) -> dict[str, Any]:
        """The tensors a resumed run needs; empty before the first `observe`."""
        state = {name: getattr(self, name) for name in self.saved}
        return {k: v.clone() for k, v in state.items() if v is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name in self.saved:
            value = state.get(name)
            setattr(self, name, None if value is None else value.clone())


def rows(x: Tensor, axis: int | None) -> Tensor:
    """x as float32 with one row for each range: (1, values) or (channels, values).

    >>> rows(torch.zeros(2, 3, 4), 1).shape
    torch.Size([3, 8])
    """
    x = x.detach().float()
    return x.reshape(1, -1) if axis is None else x.transpose(0, axis).flatten(1)


def ends(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, per tensor or per index of `axis`, as float32.

    >>> ends(torch.tensor([[1.0, 2.0], [-3.0, 4.0]]), 0)
    (tensor([ 1., -3.]), tensor([2., 4.]))
    """
    x = x.detach()
    if axis is None:
        low, high = torch.aminmax(x)
    else:
        low, high = torch.aminmax(x.transpose(0, axis).flatten(1), dim=1)
    return low.float(), high.float()
