"""What the ranks of one training agree on: collectives that do nothing in a single process."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes that train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if _on() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _on() else 0


def is_main() -> bool:
    """Whether this process writes files and prints (rank 0)."""
    return rank() == 0


def all_reduce_min_(x: Tensor) -> Tensor:
    """Smallest over the ranks, element by element, in place."""
    return _reduce_(x, dist.ReduceOp.MIN) if _on() else x


def all_reduce_max_(x: Tensor) -> Tensor:
    """Largest over the ranks, element by element, in place."""
    return _reduce_(x, dist.ReduceOp.MAX) if _on() else x


def all_reduce_sum_(x: Tensor) -> Tensor:
    """Sum over the ranks, element by element, in place."""
    return _reduce_(x, dist.ReduceOp.SUM) if _on() else x


def all_reduce_mean_(x: Tensor) -> Tensor:
    """Mean over the ranks, element by element, in place. Floating point only.

    Sum and division, because gloo has no mean of its own.
    """
    if not x.is_floating_point():
        raise ValueError(f"a mean needs a floating point tensor, got {x.dtype}.")
    return all_reduce_sum_(x).div_(world_size()) if _on() else x


def broadcast_(x: Tensor, source: int = 0) -> Tensor:
    """The value of one rank on all ranks, in place."""
    if _on():
        dist.broadcast(x, source)
    return x


def average_gradients(model: nn.Module) -> None:
    """Mean over the ranks of every gradient, in place: what DistributedDataParallel does, once.

    A parameter without gradient on this rank counts as zero if another rank has one, so ranks that
    took different paths stay together; without one anywhere it stays without.
    """
    if not _on():
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for group in _by_type(parameters):
        has = torch.tensor([p.grad is not None for p in group], dtype=torch.int32)
        somewhere = all_reduce_max_(has.to(group[0].device)).tolist()
        group = [p for p, found in zip(group, somewhere, strict=True) if found]
        if not group:
            continue
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = all_reduce_mean_(torch.cat([g.reshape(-1) for g in grads]))
        for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            p.grad = part.view_as(p).clone()


def _on() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduce_(x: Tensor, op: Any) -> Tensor:
    dist.all_reduce(x, op)
    return x


def _by_type(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault((p.dtype, p.device), []).append(p)
    return list(groups.values())
