"""Scores of movement pruning: which weights training pushes towards zero, and a loss on them.

Sanh et al. 2020, arXiv:2005.07683; for blocks, rows and columns Lagunas et al. 2021,
arXiv:2109.04838.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gracile.prune.learned import Learned


class Scores(Learned):
    """The scores of one weight; the overlay that hides what is not kept.

    The forward sees `weight * keep`. In training, from the begin of a mini-batch to its end, a
    score gets the gradient that its group's share in the mask would get, kept or not
    (straight-through): the sum of dL/dW' * W over the group, with W' the masked weight (eq. 5). One
    step of SGD thus adds -lr * dL/dW' * W (eq. 6): the score grows where a weight moves away from
    zero. All begin at 0.

    Args:
        groups: group of each entry, 0..G-1, of the weight's shape.
        device: of the weight.

    Attributes:
        keep: (G,) bool, set from outside.

    >>> s = Scores(torch.tensor([[0, 1]]), torch.device("cpu"))
    >>> s.wake()
    >>> (s(torch.tensor([[2.0, -3.0]])) * torch.tensor([[5.0, 7.0]])).sum().backward()
    >>> s.values.grad
    tensor([ 10., -21.])
    """

    def __init__(self, groups: Tensor, device: torch.device):
        super().__init__(groups, 0.0, device)
        self.keep = torch.ones(len(self.values), dtype=torch.bool, device=device)
        self.awake = False

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight with zeros where it is not kept."""
        keep = self.keep.to(self.values.dtype)
        if self.awake:
            keep = keep + (self.values - self.values.detach())  # in this order exactly 0 or 1
        return weight * self.spread(keep).to(weight.dtype)

    def open(self) -> Tensor:
        """(G,) bool: the groups that are kept."""
        return self.keep

    def wake(self) -> None:
        """Begin a mini-batch: scores get a gradient."""
        self.awake = True

    def rest(self) -> None:
        """End a mini-batch."""
        self.awake = False

    def cut(self, dim: int, index: Tensor) -> Tensor:
        """Follow a cut of the weight; returns the numbers of the groups that are left."""
        left = super().cut(dim, index)
        self.keep = self.keep[left]
        return left


def importance_loss(
    scores: Sequence[Tensor], sizes: Sequence[Tensor], *, form: str = "mean"
) -> Tensor:
    """What pulls all scores down: sigmoid(S), summed or averaged.

    Args:
        scores: (G,) of each tensor.
        sizes: (G,) weights of each group.
        form: paper: the sum over all scores (Sanh et al. 2020, arXiv:2005.07683, sec. 4.2). mean:
            the mean over tensors of each one's mean (their code). nncf: that, with every tensor
            times half the mean size of its groups, so that a row of 100 weights is pulled as hard
            as 50 times a single weight (NNCF's code).

    Returns:
        A scalar > 0.

    >>> s, n = [torch.tensor([0.0, 0.0])], [torch.tensor([3, 3])]
    >>> [float(importance_loss(s, n, form=f)) for f in ("paper", "mean", "nncf")]
    [1.0, 0.5, 0.75]
    """
    if form == "paper":
        return torch.stack([x.sigmoid().sum() for x in scores]).sum()
    means = torch.stack([x.sigmoid().mean() for x in scores])
    if form == "nncf":
        means = means * torch.stack([0.5 * n.to(means.dtype).mean() for n in sizes])
    return means.mean()


def score_at(scores: Sequence[Tensor], sizes: Sequence[Tensor], share: float) -> float:
    """The lowest score that hides more than this share of all weights, taken as a threshold.

    Args:
        scores: (G,) of each tensor.
        sizes: (G,) weights of each group.
        share: of the weights, in [0, 1).

    >>> score_at([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [torch.ones(2), torch.ones(1)], 0)
    1.0
    """
    flat = torch.cat([x.detach().cpu() for x in scores])
    order = torch.argsort(flat, stable=True)
    below = torch.cat([n.cpu() for n in sizes])[order].cumsum(0)
    k = int(torch.searchsorted(below, share * float(below[-1]), right=True))
    return float(flat[order[min(k, len(flat) - 1)]])
