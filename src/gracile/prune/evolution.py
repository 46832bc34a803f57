"""Learning how layers compare: aging evolution of one scale and one shift for each of them."""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


def evolve(
    loss_of: Callable[[Tensor], float],
    spread: Tensor,
    *,
    generations: int,
    population: int,
    samples: int,
    mutate: float,
    sigma: float,
    rng: torch.Generator,
) -> tuple[Tensor, float]:
    """The (scale, shift) of each layer that costs the least loss.

    The first candidate is (1, 0) everywhere. Each next one is a mutant: of (1, 0) until there are
    `samples` candidates, then of the best of so many drawn from the population, which are the
    latest candidates and not the best. Chin et al. 2020, arXiv:1904.12368, algorithm 1, with one
    difference: the best of all generations is returned, not of the last population.

    Args:
        loss_of: (layers, 2) scales and shifts -> loss; what is not finite loses against all others.
        spread: (layers,) standard deviation of a layer's scores: of the steps of its shift.
        generations: candidates in all, the first one included.
        population: how many of the latest candidates may have descendants.
        samples: how many of them compete to be the next parent.
        mutate: share of the layers that a mutant changes; at least one.
        sigma: standard deviation of the steps of log(scale).
        rng: of all random choices.

    Returns:
        (layers, 2) scales > 0 and shifts in float64, and their loss (inf if no loss was finite).
    """
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(len(spread), 1)
    best, lowest = start, math.inf
    pool: deque[tuple[float, Tensor]] = deque(maxlen=population)
    for generation in range(generations):
        child = start
        if generation > 0:
            parent = start if len(pool) < samples else _fittest(pool, samples, rng)
            child = mutant(parent, spread, share=mutate, sigma=sigma, rng=rng)
        loss = loss_of(child)
        loss = loss if math.isfinite(loss) else math.inf
        pool.append((loss, child))  # the oldest leaves
        if loss < lowest:
            best, lowest = child, loss
    return best, lowest


def mutant(
    parent: Tensor, spread: Tensor, *, share: float, sigma: float, rng: torch.Generator
) -> Tensor:
    """A copy with some layers changed: scale * exp(N(0, sigma^2)), shift + N(0, spread^2).

    Args:
        parent: (layers, 2) scales and shifts.
        spread: (layers,) see `evolve`.
        share: of the layers, rounded down; at least one is changed.
        sigma: see `evolve`.
        rng: of all random choices.
    """
    child = parent.clone()
    count = max(1, int(share * len(parent) + 1e-6))
    which = torch.randperm(len(parent), generator=rng)[:count]
    steps = torch.randn(count, 2, generator=rng, dtype=torch.float64)
    child[which, 0] *= (sigma * steps[:, 0]).exp()
    child[which, 1] += spread[which] * steps[:, 1]
    return child


def _fittest(pool: deque[tuple[float, Tensor]], samples: int, rng: torch.Generator) -> Tensor:
    """The best of some members, drawn without replacement."""
    drawn = torch.randperm(len(pool), generator=rng)[:samples].tolist()
    return min((pool[i] for i in drawn), key=lambda found: found[0])[1]
