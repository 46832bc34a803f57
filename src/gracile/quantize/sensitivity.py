"""How much the loss minds a change of each weight: mean curvature, from calibration data.

The loss is that of the network as it is now, in eval mode; the weights' overlays (masks) count.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gracile.distribute.collective import all_reduce_mean_

Losses = Callable[[], Generator[tuple[Tensor, int]]]  # (mean loss with its graph, images)
FEWEST = 3  # rounds before two running means can be close by more than chance


def hessian_traces(
    losses: Losses,
    weights: Mapping[str, nn.Parameter],
    *,
    generator: torch.Generator,
    rounds: int = 20,
    tolerance: float = 0.02,
) -> dict[str, float]:
    """Mean of the Hessian's diagonal over the entries of each weight, by Hutchinson's estimator.

    E[z' H z] = tr H for entries of z that are 1 or -1 with equal chance. In each round every batch
    has its own z, over all weights at once: the products between weights have mean zero, so one
    double backward serves all blocks of the diagonal.

    Args:
        losses: gives all batches anew at each call.
        weights: name -> parameter, of any shape.
        generator: of z.
        rounds: at most so many passes over the batches.
        tolerance: stops when no weight's running mean has changed by more than this share of it.

    Returns:
        tr H_ii / (entries of weight i), in units of loss per squared weight. May be negative far
        from a minimum.

    Raises:
        RuntimeError: an operator of the network cannot be differentiated twice.

    Source:
        Dong et al. 2020, arXiv:1911.03852, section 3.2 (HAWQ-v2), with z for all layers at once.
    """
    values = list(weights.values())
    sizes = torch.tensor([p.numel() for p in values], dtype=torch.float64)
    mean = torch.zeros_like(sizes)
    with _differentiable(values):
        for k in range(rounds):
            seen = _round(losses, values, generator)
            change = (seen - mean) / (k + 1)
            mean = mean + change
            if k + 1 >= FEWEST and bool((change.abs() <= tolerance * mean.abs()).all()):
                break
    return dict(zip(weights, (mean / sizes).tolist(), strict=True))


def fisher_traces(losses: Losses, weights: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Mean of the empirical Fisher matrix's diagonal over the entries of each weight.

    Mean over the images of the squared gradient: needs one backward, is never negative, and at the
    minimum of a likelihood is the Hessian's diagonal in expectation.

    Args:
        losses: one image at a time.
        weights: name -> parameter.

    Returns:
        As `hessian_traces`.

    Source:
        Martens 2014, arXiv:1412.1193, section 5 (empirical Fisher), on its diagonal.
    """
    values = list(weights.values())
    sizes = torch.tensor([p.numel() for p in values], dtype=torch.float64)
    total, images = torch.zeros_like(sizes), 0
    with _differentiable(values), closing(losses()) as batches:
        for loss, n in batches:
            grads = torch.autograd.grad(loss, values, allow_unused=True)
            total += n * _numbers([0.0 if g is None else g.pow(2).sum() for g in grads])
            images += n
    mean = all_reduce_mean_(total / max(1, images))
    return dict(zip(weights, (mean / sizes).tolist(), strict=True))


def perturbation(weight: Tensor, rounded: Tensor) -> float:
    """||Q(W) - W||^2, summed over all entries (arXiv:1911.03852, eq. 10).

    >>> perturbation(torch.tensor([0.5, -2.0]), torch.tensor([1.0, -2.0]))
    0.25
    """
    return float((rounded.double() - weight.double()).pow(2).sum())


def _round(losses: Losses, values: Sequence[nn.Parameter], g: torch.Generator) -> Tensor:
    """Mean over the batches of z' H z for each weight."""
    total, images = torch.zeros(len(values), dtype=torch.float64), 0
    with closing(losses()) as batches:
        for loss, n in batches:
            z = [_signs(p, g) for p in values]
            grads = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
            _refuse_once([g for g in grads if g is not None])
            bent = [
                (g, v) for g, v in zip(grads, z, strict=True) if g is not None and g.requires_grad
            ]
            if bent:
                first, along = zip(*bent, strict=True)
                products = torch.autograd.grad(first, values, along, allow_unused=True)
                found = zip(z, products, strict=True)
                total += n * _numbers([0.0 if h is None else (v * h).sum() for v, h in found])
            images += n
    return all_reduce_mean_(total / max(1, images))


def _refuse_once(grads: Sequence[Tensor]) -> None:
    """Look for operators that say they have one derivative only: torch would pass them over."""
    seen, stack = set[Any](), [g.grad_fn for g in grads]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "Error":  # what torch's once_differentiable leaves behind
            raise RuntimeError("an operator is marked once_differentiable")
        stack += [following for following, _ in node.next_functions]


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    z = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8)
    return (2 * z - 1).to(p.device, p.dtype)


def _numbers(values: Sequence[Tensor | float]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


@contextmanager
def _differentiable(values: Sequence[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters take part while this lasts."""
    held = [p.requires_grad for p in values]
    try:
        for p in values:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, before in zip(values, held, strict=True):
            p.requires_grad_(before)
