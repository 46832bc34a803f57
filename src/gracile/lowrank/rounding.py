"""Ranks a device is fast at: vectors are full at multiples of its period."""

from collections.abc import Sequence

from gracile.errors import UserError


def rounded_up(ranks: Sequence[int], full: Sequence[int], period: int) -> tuple[int, ...]:
    """The next multiples of the period, at most the full ranks, at least 1.

    Only for ranks that count channels, not for clusters or colours, which must divide.

    Args:
        ranks: what a rule chose.
        full: the largest that make sense, as many.
        period: channels that a device computes at once.

    Raises:
        UserError: the period is less than 1.

    >>> rounded_up((5, 17, 30), (64, 64, 31), 16)
    (16, 32, 31)
    """
    if period < 1:
        raise UserError(f"period must be >= 1, got {period}.")
    pairs = zip(ranks, full, strict=True)
    return tuple(min(max(1, -(-rank // period)) * period, most) for rank, most in pairs)
