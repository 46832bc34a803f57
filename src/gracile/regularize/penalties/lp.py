"""Lp: powers below 1 pull small weights harder than L1 does, and spare the large ones."""

from torch import Tensor

from gracile.core.kinds import penalty


@penalty("lp", source="Chartrand & Yin 2008, ICASSP, pages 3869-3872 (smoothed)")
def lp(weight: Tensor, groups: Tensor, *, p: float = 0.5, eps: float = 1e-8) -> Tensor:
    """Sum of (w^2 + eps)^(p/2) - eps^(p/2), which is |w|^p where w^2 is much larger than eps.

    Args:
        weight: any shape.
        groups: not used.
        p: the power, > 0; not convex below 1.
        eps: > 0; keeps the gradient finite near 0, where that of |w|^p is not.

    Raises:
        ValueError: p or eps is not positive.

    >>> lp(torch.tensor([4.0, -9.0]), torch.tensor([0, 1]), p=0.5, eps=1e-16)
    tensor(4.9998)
    """
    if p <= 0 or eps <= 0:
        raise ValueError(f"p and eps must be > 0, got p={p:g}, eps={eps:g}.")
    at_zero: float = eps ** (p / 2)
    return ((weight.square() + eps).pow(p / 2) - at_zero).sum()
