"""k-means: of single numbers by Lloyd's rule on sorted values, and of vectors.

Han et al. 2016, arXiv:1510.00149, section 3.1-3.2 (three ways to start); for vectors the start is
k-means++, Arthur & Vassilvitskii 2007.
"""

import torch
from torch import Tensor

MAX_ROUNDS = 200
CHUNK = 1 << 22  # distances held at once


def linear_start(values: Tensor, k: int) -> Tensor:
    """k numbers evenly spaced from the smallest value to the largest.

    Large weights, which are few and matter most, get centroids of their own (Han et al. 2016,
    section 3.2: the best of the three).

    >>> linear_start(torch.tensor([-1.0, 0.1, 0.2, 3.0]), 3)
    tensor([-1.,  1.,  3.])
    """
    low, high = values.min(), values.max()
    return torch.linspace(0, 1, k, dtype=values.dtype, device=values.device) * (high - low) + low


def density_start(values: Tensor, k: int) -> Tensor:
    """k values at evenly spaced shares of the sorted values: the middle of each k-th of them.

    >>> density_start(torch.tensor([1.0, 2.0, 3.0, 10.0]), 2)
    tensor([2., 10.])
    """
    at = ((torch.arange(k, device=values.device) + 0.5) / k * values.numel()).long()
    return values.flatten().sort().values[at]


def random_start(values: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """k different places of the values, drawn at random (Forgy), in order of size."""
    at = torch.randperm(values.numel(), generator=rng)[:k].to(values.device)
    return values.flatten()[at].sort().values


def cluster_numbers(values: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's rule on numbers, until nothing changes (at most 200 rounds).

    Every round is exact: numbers are sorted once, a cluster is a stretch of them, its mean comes
    from running sums. A cluster that is left without numbers keeps its centroid.

    Args:
        values: any shape, at least one number.
        start: (k,) first centroids.

    Returns:
        (k,) centroids in rising order, and the cluster of each value (int64, of values' shape);
        the sum of squared distances is a local minimum. A tie goes to the smaller centroid.

    >>> cluster_numbers(torch.tensor([0.0, 1.0, 10.0]), torch.tensor([0.0, 5.0]))
    (tensor([ 0.5000, 10.0000]), tensor([0, 0, 1]))
    """
    flat = values.detach().flatten().double()
    ordered = flat.sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    centroids = start.detach().double().sort().values
    for _ in range(MAX_ROUNDS):
        ends = torch.searchsorted(ordered, _borders(centroids), right=True)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        counts = edges.diff()
        means = (sums[edges[1:]] - sums[edges[:-1]]) / counts.clamp(min=1)
        moved = torch.where(counts > 0, means, centroids).sort().values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    codes = torch.searchsorted(_borders(centroids), flat)  # left: a tie goes to the smaller
    return centroids.to(values.dtype), codes.reshape(values.shape)


def cluster_vectors(points: Tensor, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """k-means of vectors, begun by k-means++; at most 200 rounds.

    Args:
        points: (n, d).
        k: number of centroids, at most n.
        rng: draws the start.

    Returns:
        (k, d) centroids and (n,) clusters (int64). A cluster that is left empty takes the point
        that is farthest from its centroid.
    """
    x = points.detach().double()
    centroids = _spread_start(x, k, rng)
    distances, codes = _nearest(x, centroids)
    for _ in range(MAX_ROUNDS):
        counts = torch.bincount(codes, minlength=k)
        sums = torch.zeros_like(centroids).index_add_(0, codes, x)
        centroids = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centroids[empty] = x[distances.argsort(descending=True, stable=True)[: len(empty)]]
        distances, again = _nearest(x, centroids)
        if torch.equal(again, codes):
            break
        codes = again
    return centroids.to(points.dtype), codes


def _borders(centroids: Tensor) -> Tensor:
    return (centroids[1:] + centroids[:-1]) / 2


def _spread_start(x: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Each next centroid is a point, drawn by its squared distance to those there are."""
    first = int(torch.randint(len(x), (1,), generator=rng))
    chosen = [first]
    far = (x - x[first]).square().sum(1)
    for draw in torch.rand(k - 1, generator=rng, dtype=torch.float64).tolist():
        total = far.cumsum(0)
        at = int(torch.searchsorted(total, draw * total[-1], right=True).clamp(max=len(x) - 1))
        chosen.append(at)
        far = torch.minimum(far, (x - x[at]).square().sum(1))
    return x[torch.tensor(chosen, device=x.device)]


def _nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of each point to its nearest centroid, and which it is."""
    rows = max(1, CHUNK // len(centroids))
    norms = centroids.square().sum(1)
    found = [(norms - 2 * part @ centroids.T).min(1) for part in x.split(rows)]
    distances = torch.cat([f.values for f in found]) + x.square().sum(1)
    return distances, torch.cat([f.indices for f in found])
