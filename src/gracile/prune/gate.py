"""Gates of regularization-based sparsity: binary, noisy, with a straight-through gradient.

Kozlov et al. 2020, arXiv:2002.08679, after the L0 regularization of Louizos et al. 2018,
arXiv:1712.01312.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gracile.prune.learned import Learned

CLIP = 1e-6  # of the uniform noise, so that its logit is finite


def binary_gates(x: Tensor) -> Tensor:
    """1 where x > 0, which is sigmoid(x) > 0.5, else 0; with the gradient of sigmoid(x).

    >>> binary_gates(torch.tensor([-0.1, 0.0, 2.0]))
    tensor([0., 0., 1.])
    """
    soft = x.sigmoid()
    return (x > 0).to(x.dtype) + (soft - soft.detach())  # in this order exactly 0 or 1


# What counts as kept, and the scale p of the difference.
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "paper": (torch.sigmoid, 1.0),
    "released": (binary_gates, 0.05),
}


def density_loss(
    logits: Sequence[Tensor],
    sizes: Sequence[Tensor],
    density: float,
    *,
    form: str = "released",
    scope: str = "global",
) -> Tensor:
    """How far the share of weights that are kept is from `density`: ((kept / all - density) / p)^2.

    Args:
        logits: (G,) of each tensor.
        sizes: (G,) weights behind each gate.
        density: wanted share of weights that are not zero.
        form: paper: kept is the expected number, sum of sigmoid(s), and p = 1 (Kozlov et al. 2020,
            arXiv:2002.08679, L_reg of RB sparsity). released: kept counts gates with s > 0,
            straight-through, and p = 0.05 (their code).
        scope: global: one share over all tensors; layer: the mean of the losses of the tensors
            (the released code squares a sum of absolute differences there).

    Returns:
        A scalar >= 0.

    >>> s = torch.tensor([4.0, 0.0])  # expected (0.982 + 0.5) / 2 = 0.741, counted 1 / 2
    >>> density_loss([s], [torch.tensor([1, 1])], 0.4, form="paper")
    tensor(0.1163)
    >>> density_loss([s], [torch.tensor([1, 1])], 0.4)  # (0.1 / 0.05)^2
    tensor(4.0000)
    """
    count, p = FORMS[form]
    kept = torch.stack([(count(x) * n).sum() for x, n in zip(logits, sizes, strict=True)])
    total = torch.stack([n.sum() for n in sizes])
    share = kept / total if scope == "layer" else kept.sum() / total.sum()
    return ((share - density) / p).square().mean()


class Gate(Learned):
    """The gates of one weight; the overlay that multiplies the weight by them.

    In training, from the begin of a mini-batch to its end, a gate is open if s + logit(u) > 0, and
    the logits get a gradient; at any other time it is open if s > 0, and they get none.

    Args:
        groups: gate of each entry, 0..G-1, of the weight's shape.
        keep: chance of a gate to be open.
        device: of the weight.
    """

    def __init__(self, groups: Tensor, keep: float, device: torch.device):
        self.noise: Tensor | None = None
        self.owner: nn.Module | None = None  # the weight's module, whose mode counts
        super().__init__(
            groups, float(torch.logit(torch.tensor(keep, dtype=torch.float64))), device
        )

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight with zeros where gates are closed."""
        if self.noise is None or self.owner is None or not self.owner.training:
            return weight * self.mask().to(weight.dtype)
        return weight * self.spread(binary_gates(self.logits + self.noise)).to(weight.dtype)

    @property
    def logits(self) -> nn.Parameter:
        """(G,) s of each gate."""
        return self.values

    def draw(self, rng: torch.Generator, owner: nn.Module) -> None:
        """Begin a mini-batch: one noise for all its forwards."""
        uniform = torch.rand(self.logits.shape, generator=rng, device=self.logits.device)
        self.noise, self.owner = torch.logit(uniform, CLIP), owner

    def rest(self) -> None:
        """End a mini-batch."""
        self.noise = self.owner = None

    def open(self) -> Tensor:
        """(G,) bool: gates that are open without noise."""
        return self.logits.detach() > 0

    def expected(self) -> float:
        """Expected number of weights behind open gates, with noise."""
        return float((self.sizes * self.logits.detach().sigmoid()).sum())
