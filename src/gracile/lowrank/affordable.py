"""The largest ranks a budget allows, found on the description of the chain alone."""

from collections.abc import Callable

from gracile.errors import UserError
from gracile.lowrank.scheme import along
from gracile.nn.chain import Chain, Layer
from gracile.nn.schemes import chain_of, full_ranks


def largest_ranks(
    scheme: str, layer: Layer, cost: Callable[[Chain], int], budget: float, what: str
) -> tuple[int, ...]:
    """The last ranks on the scheme's way from 1 to full whose chain costs at most the budget.

    Costs are exact, biases, strides and channels rounded down included, and never fall along the
    way, so halving finds the last; up to roundings that is the root of the cost's polynomial.

    Args:
        scheme, layer: see `gracile.lowrank.scheme.chain_of`.
        cost: of a chain.
        budget: in the cost's unit.
        what: the unit, for the message.

    Raises:
        UserError: the smallest ranks cost more.
    """

    def fits(t: int) -> bool:
        return cost(chain_of(scheme, layer, along(scheme, layer, t))) <= budget

    if not fits(1):
        least = cost(chain_of(scheme, layer, along(scheme, layer, 1)))
        raise UserError(
            f"'{scheme}' has at least {least} {what}, above the {budget:.0f} that are asked for. "
            "Ask for a larger ratio, or leave this layer out."
        )
    low, high = 1, max(full_ranks(scheme, layer)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return along(scheme, layer, low)


def check_ratio(ratio: float) -> None:
    """A ratio is in (0, 1].

    Raises:
        UserError: it is not.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"ratio must be in (0, 1], got {ratio}. For a half write 0.5.")
