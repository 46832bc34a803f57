"""Which weights go as one in every tensor, refused early where it does not fit, and their norms."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gracile.core.groups import MEASURES
from gracile.errors import BindError, UserError
from gracile.recipe.fields import Kernel


def group_ids(id: str, granularity: Kernel, s: Any, addresses: Iterable[str]) -> dict[str, Tensor]:
    """Address -> group id of each of its elements.

    Args:
        id: of the method that asks.
        granularity: a kernel of that kind.
        s: the session.
        addresses: of parameters.

    Raises:
        BindError: a tensor's shape has no such groups.
    """
    out = {}
    for address in addresses:
        shape = tuple(s.parameter(address).shape)
        try:
            out[address] = granularity.fn(shape)
        except (UserError, IndexError) as e:
            why = f": {e}" if isinstance(e, UserError) else "."
            raise BindError(
                f"'{id}': '{address}' of shape {shape} has no groups of granularity "
                f"{granularity.name}{why} Narrow the selector."
            ) from None
    return out


def group_norms(weight: Tensor, groups: Tensor, reduce: str) -> Tensor:
    """The norm of each group.

    Args:
        weight: any shape.
        groups: group id of each element, same shape, 0..G-1.
        reduce: mean_abs: mean of |w|; max: largest |w|; l2: Euclidean norm.

    Returns:
        (G,) in weight's type and on its device.

    >>> group_norms(torch.tensor([3.0, -4.0, 1.0]), torch.tensor([0, 0, 1]), "l2")
    tensor([5., 1.])
    """
    return MEASURES[reduce](weight.double(), groups).to(weight.dtype)
