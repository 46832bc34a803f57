"""Ranks as they are told."""

from collections.abc import Sequence
from math import ceil

from torch import Tensor

from gracile.core.kinds import rank_rule
from gracile.errors import UserError
from gracile.nn.chain import Layer, Size
from gracile.nn.schemes import full_ranks


@rank_rule("fixed", source="no rule: the user's numbers")
def fixed(
    weight: Tensor,
    layer: Layer,
    scheme: str,
    size: Size,
    *,
    ranks: Sequence[int] | None = None,
    share: float = 0.5,
) -> tuple[int, ...]:
    """The ranks given, or a share of the full ones, rounded up; at most the full ones.

    Args:
        weight: not looked at.
        layer, scheme: what is factorized, and how.
        size: not looked at.
        ranks: as many as the scheme has; None takes the share.
        share: in (0, 1], of each full rank; for ranks that count clusters, give `ranks`.

    Raises:
        UserError: another number of ranks, a rank below 1, or a share out of range.
    """
    full = full_ranks(scheme, layer)
    if ranks is None:
        if not 0 < share <= 1:
            raise UserError(f"share must be in (0, 1], got {share}. For a half write 0.5.")
        return tuple(ceil(share * n) for n in full)
    if len(ranks) != len(full) or min(ranks) < 1:
        raise UserError(f"'{scheme}' has {len(full)} ranks >= 1, got {tuple(ranks)}.")
    return tuple(min(r, n) for r, n in zip(ranks, full, strict=True))
