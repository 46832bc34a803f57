"""Evaluation: top-1, top-5, loss, and what changed sample by sample.

Everything takes logits, so a PyTorch model and an artifact in a runtime are judged by one code.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """Accuracy on one split: shares in [0, 1], loss in nats; `top5` is None below 6 classes."""

    top1: float
    top5: float | None
    loss: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "n": self.n}


@dataclass(frozen=True)
class Agreement:
    """How a compressed model's answers differ from the original's on the same samples.

    Attributes:
        share: share of samples with the same top-1 answer.
        flips: samples whose answer changed.
        lost: right before, wrong after. gained: the reverse.
        worst_class: the class that lost most accuracy, and by how many points.
        mcnemar_p: two-sided exact p of "as many lost as gained" (McNemar 1947, exact binomial).
    """

    share: float
    flips: int
    lost: int
    gained: int
    worst_class: int
    worst_class_drop: float
    mcnemar_p: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


def predict(
    fn: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) over all batches, on the CPU."""
    logits, labels = [], []
    for x, y in batches:
        out = fn(x)
        logits.append(torch.as_tensor(out).detach().float().cpu())
        labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)


def predict_module(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Like `predict` for a module: eval mode, no gradient, mode restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return predict(model, batches)
    finally:
        model.train(was_training)


def score(logits: Tensor, labels: Tensor) -> Score:
    """Top-1, top-5 and mean cross-entropy.

    >>> score(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1])).top1
    0.5
    """
    ranked = logits.argsort(dim=1, descending=True, stable=True)
    hits = ranked == labels[:, None]
    return Score(
        top1=float(hits[:, 0].double().mean()),
        top5=float(hits[:, :5].any(1).double().mean()) if logits.shape[1] > 5 else None,
        loss=float(F.cross_entropy(logits, labels)),
        n=len(labels),
    )


def agreement(before: Tensor, after: Tensor, labels: Tensor) -> Agreement:
    """Compare two models' logits on the same samples."""
    a, b = before.argmax(1), after.argmax(1)
    right_a, right_b = a == labels, b == labels
    lost, gained = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    drops = {}
    for c in labels.unique().tolist():
        own = labels == c
        drops[c] = float(right_a[own].double().mean() - right_b[own].double().mean())
    worst = max(drops, key=lambda c: drops[c])
    return Agreement(
        share=float((a == b).double().mean()),
        flips=int((a != b).sum()),
        lost=lost,
        gained=gained,
        worst_class=int(worst),
        worst_class_drop=100 * drops[worst],
        mcnemar_p=mcnemar(lost, gained),
        n=len(labels),
    )


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p that `lost` and `gained` come from a fair coin.

    >>> mcnemar(3, 3), mcnemar(0, 5)
    (1.0, 0.0625)
    """
    n, k = lost + gained, min(lost, gained)
    if n == 0:
        return 1.0
    tail = sum(math.exp(_log_choose(n, i) - n * math.log(2)) for i in range(k + 1))
    return min(1.0, round(2 * tail, 12))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
