"""Entropy calibration: the clip at which the quantized distribution tells most of the true one."""

import torch
from torch import Tensor

from gracile.core.kinds import observer
from gracile.quantize.observers.counting import HALF, Counting, Histogram

TRIES = 256  # clips that are tried, evenly spaced


@observer("kl", source="Migacz, 8-bit inference with TensorRT, GTC 2017; Wu 2020, arXiv:2004.09602")
class Entropy(Counting):
    """Magnitudes beyond the clip with the least Kullback-Leibler divergence are cut off.

    The histogram of magnitudes up to the clip, its last bin holding all that is cut off, is
    compared with itself squeezed into as many bins as the grid has levels. Values that are exactly
    zero do not count: they are on every grid, and behind a ReLU they would outweigh the rest. One
    clip serves both signs. With 4,096 bins of magnitude, 256 clips are tried, where the paper has
    2,048 and tries each.

    A grid of more than 12 bits is not clipped. Channels share the width of bins, so one that is
    smaller than the largest by far is not clipped either.
    """

    def clipped(self, seen: Histogram, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """[-clip, clip] of each channel."""
        mirrored = self.signed and self.symmetric
        one_side = bool((low >= 0).all() or (high <= 0).all()) and not mirrored
        levels = 2 ** (self.bits if one_side else self.bits - 1)
        counts = seen.counts[:, HALF:] + seen.counts[:, :HALF].flip(1)
        occupied = HALF - (counts.flip(1) > 0).double().argmax(1)
        widest = torch.maximum(-low, high)
        clip, least = widest.clone(), torch.full_like(widest, torch.inf)
        stride = max(1, (HALF - levels) // TRIES)
        for n in (*range(levels, HALF, stride), HALF):
            found = _divergence(counts, n, levels)
            better = (found < least) & (n - stride < occupied)
            least = torch.where(better, found, least)
            clip = torch.where(better, n * seen.width, clip)
        clip = torch.where(occupied > levels, clip, widest)
        return -clip, clip


def _divergence(counts: Tensor, n: int, levels: int) -> Tensor:
    """KL(P || Q) of clipping magnitudes after n bins, (channels,); inf where Q misses one."""
    p = counts[:, :n].clone()
    at = torch.div(torch.arange(n, device=p.device) * levels, n, rounding_mode="floor")
    held = torch.zeros(len(p), levels, dtype=p.dtype, device=p.device).index_add_(1, at, p)
    filled = torch.zeros_like(held).index_add_(1, at, (p > 0).double())
    q = (held / filled.clamp(min=1))[:, at] * (p > 0)
    p[:, -1] += counts[:, n:].sum(1)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    terms = torch.where(p > 0, p * (p / q).log(), 0.0)
    return torch.where(terms.isnan(), torch.inf, terms).sum(1)  # NaN: all of it is cut off
