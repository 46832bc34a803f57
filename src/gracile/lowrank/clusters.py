"""Clusters of equal sizes: what grouped layers need, whose groups are all as large."""

from collections.abc import Callable

import torch
from torch import Tensor


def equal_kmeans(
    points: Tensor, clusters: int, generator: torch.Generator, *, starts: int = 4
) -> Tensor:
    """Label 0..clusters-1 of each point, every label as often; least squared distances to means.

    Args:
        points: (n, d); `clusters` divides n.
        clusters: how many.
        generator: of the starts: points far from those chosen are likelier (k-means++).
        starts: the best of as many is taken.

    Source:
        Denton et al. 2014, arXiv:1404.0736; k-means++ of Arthur & Vassilvitskii 2007.
    """
    tried = []
    for _ in range(starts):
        begin = fairly_assigned(torch.cdist(points, _seeds(points, clusters, generator)) ** 2)
        labels = settled(begin, lambda now: _to_means(points, now, clusters))
        cost = _to_means(points, labels, clusters).gather(1, labels.unsqueeze(1)).sum()
        tried.append((float(cost), labels))
    return min(tried, key=lambda pair: pair[0])[1]


def settled(labels: Tensor, cost_of: Callable[[Tensor], Tensor], rounds: int = 50) -> Tensor:
    """Labels that no swap of two members improves, costs worked out anew after each round.

    Args:
        labels: (n,) where to begin; how often each occurs stays.
        cost_of: labels -> (n, clusters) cost of each point in each cluster, given who is in it.
        rounds: at most as many.
    """
    for _ in range(rounds):
        better = swapped(cost_of(labels), labels)
        if torch.equal(better, labels):
            break
        labels = better
    return labels


def swapped(cost: Tensor, labels: Tensor) -> Tensor:
    """Swap the pair that lowers the total most, until none does.

    Args:
        cost: (n, clusters).
        labels: (n,).
    """
    labels, cost = labels.clone(), cost.double()
    slack = 1e-12 * float(cost.abs().max()) if len(cost) else 0.0
    for _ in range(len(labels) ** 2):
        there = cost[:, labels]  # (n, n): of point p at the place of q
        here = cost.gather(1, labels.unsqueeze(1)).squeeze(1)
        change = there + there.T - here.unsqueeze(0) - here.unsqueeze(1)
        place = int(change.argmin())
        p, q = divmod(place, len(labels))
        if float(change[p, q]) >= -slack:
            break
        labels[p], labels[q] = labels[q].clone(), labels[p].clone()
    return labels


def fairly_assigned(cost: Tensor) -> Tensor:
    """Each point to its cheapest cluster that has room, the cheapest pairs first.

    Args:
        cost: (n, clusters); the number of clusters divides n.
    """
    n, clusters = cost.shape
    labels, room = [-1] * n, [n // clusters] * clusters
    for place in cost.flatten().argsort(stable=True).tolist():
        point, cluster = divmod(place, clusters)
        if labels[point] < 0 and room[cluster]:
            labels[point] = cluster
            room[cluster] -= 1
    return torch.tensor(labels, device=cost.device)


def _seeds(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    def draw(chances: Tensor) -> int:
        return int(torch.multinomial(chances.cpu(), 1, generator=generator))

    chosen = [draw(torch.ones(len(points)))]
    while len(chosen) < clusters:
        far = torch.cdist(points, points[chosen]).amin(1) ** 2
        far = far if float(far.sum()) > 0 else torch.ones_like(far)
        chosen.append(draw(far))
    return points[chosen]


def _to_means(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    means = torch.stack([points[labels == c].mean(0) for c in range(clusters)])
    return torch.cdist(points, means) ** 2
