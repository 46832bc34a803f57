"""Statistics-aware weight binning: the end of a weight's grid from its first two moments.

Choi et al. 2018, "Bridging the accuracy gap for 2-bit quantized neural networks",
arXiv:1807.06964, section 3: fitted to the ends of least squared error of six distributions. The
numbers are those of the authors' released code.
"""

import torch
from torch import Tensor

from gracile.quantize.dorefa import DorefaGrid, odd_levels

# bits -> (c1, c2); the paper's 2^k levels without 0, and 2^k - 1 levels with it.
ODD = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64)}
WITH_ZERO = {2: (2.6, 1.71), 4: (12.035, 12.03)}
MOST = 5  # from more bits on the fit is bad for flat distributions, and little is to be won


def best_end(weight: Tensor, bits: int, odd: bool) -> Tensor:
    """c1 sqrt(E w^2) - c2 E|w|; the largest |w| where that is less, or for more than 5 bits.

    Args:
        weight: any shape.
        bits: k.
        odd: without a level for 0.

    >>> best_end(torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, -1.0, 1.0, -3.0]), 2, True)
    tensor(2.0779)
    """
    magnitudes = weight.abs()
    found = most = magnitudes.max()
    if bits <= MOST:
        c1, c2 = (ODD if odd else WITH_ZERO)[bits]
        end = c1 * weight.square().mean().sqrt() - c2 * magnitudes.mean()
        found = torch.where(end > 0, torch.minimum(end, most), most)
    return torch.where(found > 0, found, torch.ones_like(found))


class SawbGrid(DorefaGrid):
    """The overlay that puts a weight on 2^k levels up to its best end, with one scale.

    The gradient goes straight through, also where the weight is clipped.
    """

    def fresh(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """End / (largest integer); zero point 0."""
        scale = best_end(weight.detach().float(), self.bits, self.odd) / self.qmax
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def __call__(self, weight: Tensor) -> Tensor:
        scale, still = self.params(weight)[0], weight.detach()
        unit = (still / (scale * self.qmax)).clamp(-1, 1)
        levels = odd_levels(unit, self.bits) if self.odd else torch.round(unit * self.qmax)
        return levels * scale + (weight - still)
