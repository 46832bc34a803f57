"""Keep as many singular values as hold a share of the energy."""

import torch
from torch import Tensor

from gracile.core.kinds import rank_rule
from gracile.errors import UserError
from gracile.lowrank.scheme import matrices
from gracile.nn.chain import Layer, Size


@rank_rule("energy", source="Eckart & Young 1936; Zhang et al. 2015, arXiv:1411.4229")
def energy(
    weight: Tensor, layer: Layer, scheme: str, size: Size, *, share: float = 0.9
) -> tuple[int, ...]:
    """The smallest ranks with sum of s_i^2 over those kept >= share of the sum over all.

    1 - share is then the squared relative error (for two ranks, of each mode by itself). Matrices
    that have one rank, those of groups or channels, are counted together.

    Args:
        weight: (O, I / groups, *kernel), or in the metric of data
            (`gracile.lowrank.factorizers.svd_data.whitened`).
        layer, scheme: what is factorized, and how.
        size: not looked at.
        share: in (0, 1]; bigger keeps more.

    Raises:
        UserError: the share is out of range, or the scheme's ranks are not those of matrices.
    """
    if not 0 < share <= 1:
        raise UserError(f"share must be in (0, 1], got {share}. For 90 % write 0.9.")
    found = []
    for matrix in matrices(scheme, weight, layer):
        power = torch.linalg.svdvals(matrix).square().sum(0)
        kept = power.cumsum(0)
        enough = kept >= share * kept[-1] * (1 - 1e-12)  # rounding of the sums
        found.append(int(enough.int().argmax()) + 1)
    return tuple(found)
