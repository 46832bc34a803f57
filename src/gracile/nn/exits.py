"""Early exits: heads that answer behind an inner layer, and the choice of one answer (BranchyNet).

Teerapittayanon, McDanel & Kung 2016, arXiv:1709.01686. An input leaves at the first exit that is
sure: whose answer has an entropy below a threshold. No label is asked.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from gracile.core.kinds import exit_head
from gracile.errors import UserError

SOURCE = "Teerapittayanon, McDanel & Kung 2016, arXiv:1709.01686"
HOME = "early_exits"  # where heads and choice live in a model
CHOICE = f"{HOME}.choice"


@exit_head("pool_linear", source=SOURCE)
def pool_linear(shape: Sequence[int], classes: int) -> nn.Sequential:
    """The mean over all places, then a linear layer: next to no cost.

    Args:
        shape: of one sample: (C,), or (C, H, W).
        classes: answers.

    Raises:
        UserError: another number of dims.
    """
    return nn.Sequential(_steps(shape, shape[0], classes))


@exit_head("conv_pool_linear", source=SOURCE)
def conv_pool_linear(shape: Sequence[int], classes: int, *, width: int = 0) -> nn.Sequential:
    """A 3x3 convolution with batch norm and ReLU, the mean over all places, a linear layer.

    Args:
        shape: of one sample: (C, H, W).
        classes: answers.
        width: channels of the convolution; 0: as many as come in.

    Raises:
        UserError: another number of dims, or a negative width.
    """
    if len(shape) != 3 or width < 0:
        raise UserError(
            f"the head conv_pool_linear reads (C, H, W) with a width >= 0, got {tuple(shape)} and "
            f"{width}. For plain features take pool_linear."
        )
    width = width or shape[0]
    head = nn.Sequential()
    head.add_module("conv", nn.Conv2d(shape[0], width, 3, padding=1, bias=False))
    head.add_module("bn", nn.BatchNorm2d(width))
    head.add_module("relu", nn.ReLU())
    for name, step in _steps(shape, width, classes).items():
        head.add_module(name, step)
    return head


class Choice(nn.Module):
    """All answers in, the one that counts out: of the first exit that is sure, else the final one.

    In train mode it is always the final one. `thresholds` and `temperatures` (K,) are buffers, so
    part of a checkpoint; at first the thresholds are 0, and nothing leaves early.

    Attributes:
        mixed: give a sum of all answers in the place of one; for proofs, which must see them all.

    Args:
        exits: K, how many there are beside the final one.
    """

    thresholds: Tensor
    temperatures: Tensor

    def __init__(self, exits: int):
        super().__init__()
        self.register_buffer("thresholds", torch.zeros(exits))
        self.register_buffer("temperatures", torch.ones(exits))
        self.mixed = False

    def forward(self, final: Tensor, *early: Tensor) -> Tensor:
        """(N, C) from the final answer and those of the exits, in the order they are reached."""
        if self.mixed:
            return final + sum((k + 2) * x for k, x in enumerate(early))
        if self.training:
            return final
        out = final
        for k in reversed(range(len(early))):
            sure = entropy(early[k], self.temperatures[k]) < self.thresholds[k]
            out = torch.where(sure[:, None], early[k], out)
        return out

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"thresholds={[round(float(t), 4) for t in self.thresholds]}"


def entropy(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """How unsure answers are: the entropy of softmax(logits / temperature) / log C.

    Args:
        logits: (..., C), C >= 2.
        temperature: > 0.

    Returns:
        (...) in [0, 1]; 0 is sure of one class, 1 knows nothing.

    >>> entropy(torch.tensor([[0.0, 0.0], [50.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    p = torch.log_softmax(logits / temperature, dim=-1)
    # Rounding may bring a sure answer to -1e-8, below a threshold of 0.
    return (-(p.exp() * p).sum(-1) / log(logits.shape[-1])).clamp(min=0)


def choice_of(model: nn.Module) -> Choice | None:
    """The choice among a model's exits; None if it has none."""
    return next((m for m in model.modules() if isinstance(m, Choice)), None)


@contextmanager
def answers_seen(model: nn.Module) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
    """While this lasts: a function that gives all answers of the last forward, the end's last.

    Raises:
        UserError: the model has no exits.
    """
    choice = choice_of(model)
    if choice is None:
        raise UserError("this model has no early exits; attach them with early_exit: branches.")
    seen: list[Any] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = args

    handle = choice.register_forward_pre_hook(keep)
    try:
        yield lambda: (*seen[1:], *seen[:1])
    finally:
        handle.remove()


def all_exits(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The answers of all exits to a batch, in the order they are reached, the final one last.

    Raises:
        UserError: the model has no exits.
    """
    with answers_seen(model) as answers:
        model(*inputs)
        return answers()


def _steps(shape: Sequence[int], width: int, classes: int) -> OrderedDict[str, nn.Module]:
    """Pooling, where there are places, and the linear layer, by name."""
    if len(shape) not in (1, 3):
        raise UserError(
            f"an exit's head reads (C,) or (C, H, W), got {tuple(shape)}. Put the exit behind a "
            "convolution, an activation or a pooled vector."
        )
    steps: dict[str, nn.Module] = {}
    if len(shape) == 3:
        steps |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return OrderedDict({**steps, "fc": nn.Linear(width, classes)})
