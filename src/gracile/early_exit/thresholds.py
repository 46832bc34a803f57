"""How sure an exit must be: calibration on validation answers, and thresholds for a goal.

The idea is BranchyNet's (Teerapittayanon et al. 2016, arXiv:1709.01686): an input leaves at the
first exit whose answer has an entropy below a threshold. Temperatures are those of Guo et al. 2017,
arXiv:1706.04599. Choosing thresholds from the accuracy and the mean cost they would have had on
validation data is ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log, prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gracile.nn.exits import entropy

QUANTILES = 101  # candidates for one exit: each sends about 1 % more of the inputs out
COMBINATIONS = 20_000  # tried at most; beyond it one exit at a time is opened further
ALWAYS = 1.01  # an entropy is at most 1
TEMPERATURES = (0.05, 20.0)
_GOLDEN = (5**0.5 - 1) / 2

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Operation:
    """A network with exits at some thresholds, judged on labelled data.

    Attributes:
        thresholds: of each exit.
        accuracy: share of right answers, in [0, 1].
        mean_cost: mean over the inputs, in the unit of the costs.
        rates: share of the inputs that leave at each exit, and at the end; sums to 1.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    mean_cost: float
    rates: tuple[float, ...]


def calibrated(logits: Tensor, labels: Tensor) -> float:
    """The temperature that makes softmax(logits / T) the likeliest for the labels.

    Args:
        logits: (N, C).
        labels: (N,) classes.

    Returns:
        T in [0.05, 20]: above 1 for answers that are surer than right. The negative log-likelihood
        is convex in 1 / T; it is found by golden section.
    """
    logits = logits.detach().double().cpu()
    labels = labels.cpu()

    def cost(x: float) -> float:
        return float(cross_entropy(logits * exp(x), labels))

    low, high = -log(TEMPERATURES[1]), -log(TEMPERATURES[0])
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_a, at_b = cost(a), cost(b)
    while high - low > 1e-4:
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - _GOLDEN * (high - low)
            at_a = cost(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + _GOLDEN * (high - low)
            at_b = cost(b)
    return exp(-(low + high) / 2)


def operate(
    entropies: Floats, right: npt.NDArray[np.bool_], costs: Sequence[float], at: Sequence[float]
) -> Operation:
    """What comes of some thresholds.

    Args:
        entropies: (K, N) normalized, of each exit's answer to each input.
        right: (K + 1, N) whether each answer is, the final one last.
        costs: K + 1, what an input costs that leaves there; of all that ran until then.
        at: K thresholds.

    >>> operate(np.array([[0.1, 0.9]]), np.array([[True, False], [True, True]]), [1, 3], [0.5])
    Operation(thresholds=(0.5,), accuracy=1.0, mean_cost=2.0, rates=(0.5, 0.5))
    """
    left = np.ones(right.shape[1], dtype=bool)
    hits, rates = 0, []
    for k, threshold in enumerate((*at, np.inf)):
        goes = left & (entropies[k] < threshold) if k < len(at) else left
        hits += int((right[k] & goes).sum())
        rates.append(float(goes.mean()))
        left = left & ~goes
    cost = float(np.dot(rates, np.asarray(costs, np.float64)))
    return Operation(tuple(map(float, at)), hits / right.shape[1], cost, tuple(rates))


def curve(
    entropies: Floats,
    right: npt.NDArray[np.bool_],
    costs: Sequence[float],
    *,
    quantiles: int = QUANTILES,
    combinations: int = COMBINATIONS,
) -> list[Operation]:
    """The best thresholds for every mean cost: none is both cheaper and more often right.

    Candidates are quantiles of each exit's entropies, from never to always. All combinations are
    tried where there are few; else one exit at a time is opened by one candidate, the one that
    loses the fewest right answers for what it saves.

    Args:
        entropies, right, costs: see `operate`.
        quantiles: candidates of an exit beside never.
        combinations: tried at most.

    Returns:
        By mean cost, the cheapest first.
    """
    grids = [_candidates(e, quantiles) for e in entropies]
    if prod(len(g) for g in grids) <= combinations:
        found = [operate(entropies, right, costs, at) for at in product(*grids)]
    else:
        found = list(_opened(entropies, right, costs, grids))
    return _undominated(found)


def cheapest(found: Sequence[Operation], accuracy: float) -> Operation:
    """The point of least mean cost that is right often enough.

    Args:
        found: a `curve`; the network without early exits is on it or beaten by it.
        accuracy: share; where no point has it, the most accurate one is taken.
    """
    enough = [p for p in found if p.accuracy >= accuracy - 1e-12]
    return min(enough, key=lambda p: p.mean_cost) if enough else max(found, key=_accuracy)


def most_accurate(found: Sequence[Operation], mean_cost: float) -> Operation | None:
    """The point that is right most often and costs no more; None if all cost more."""
    return max((p for p in found if p.mean_cost <= mean_cost + 1e-12), key=_accuracy, default=None)


def _accuracy(point: Operation) -> float:
    return point.accuracy


def _candidates(entropies: Floats, quantiles: int) -> list[float]:
    """Never, then thresholds half-way between neighbours of the sorted entropies, then always."""
    values = np.unique(entropies)
    middles = (values[1:] + values[:-1]) / 2
    if len(middles) > quantiles - 2:
        cuts = np.quantile(entropies, np.linspace(0, 1, quantiles)[1:-1])
        middles = middles[np.unique(np.searchsorted(middles, cuts).clip(max=len(middles) - 1))]
    return [0.0, *map(float, middles), ALWAYS]


def _opened(
    entropies: Floats,
    right: npt.NDArray[np.bool_],
    costs: Sequence[float],
    grids: Sequence[Sequence[float]],
) -> Iterator[Operation]:
    place = [0] * len(grids)
    here = operate(entropies, right, costs, [g[0] for g in grids])
    yield here
    while True:
        steps = []
        for k, grid in enumerate(grids):
            if place[k] + 1 < len(grid):
                at = [g[p + (j == k)] for j, (g, p) in enumerate(zip(grids, place, strict=True))]
                there = operate(entropies, right, costs, at)
                saved, lost = here.mean_cost - there.mean_cost, here.accuracy - there.accuracy
                steps.append((lost / saved if saved > 0 else np.inf, k, there))
        if not steps:
            return
        _, k, here = min(steps, key=lambda step: step[:2])
        place[k] += 1
        yield here


def _undominated(found: Sequence[Operation]) -> list[Operation]:
    out: list[Operation] = []
    for point in sorted(found, key=lambda p: (p.mean_cost, -p.accuracy)):
        if not out or point.accuracy > out[-1].accuracy:
            out.append(point)
    return out


def as_arrays(
    answers: Sequence[Tensor], labels: Tensor, temperatures: Sequence[float]
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Entropies (K, N) of the exits and which answers (K + 1, N) are right; see `operate`.

    Args:
        answers: logits (N, C) of each exit, the final ones last.
        labels: (N,) classes.
        temperatures: of each exit.
    """
    sure = [entropy(x.float(), t) for x, t in zip(answers[:-1], temperatures, strict=True)]
    right = [(x.argmax(1) == labels).cpu().numpy() for x in answers]
    return torch.stack(sure).double().cpu().numpy(), np.stack(right)
