"""FitNets' regressor: a layer that gives a student's features the teacher's number of channels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.graph.surgery import replace_data


class Regressor(nn.Module):
    """A 1x1 convolution, or a linear layer along one dim.

    Args:
        student: shape of what it reads.
        teacher: shape of what it gives; differs in `dim` only.
        dim: of the channels.
        seed: of its first weights.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], dim: int, seed: int):
        super().__init__()
        self.dim = dim
        fan = student[dim]
        generator = torch.Generator().manual_seed(seed)
        bound = fan**-0.5  # as torch.nn.Linear and Conv2d
        weight = torch.empty(teacher[dim], fan).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(teacher[dim]).uniform_(-bound, bound, generator=generator)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., C_s, ...) -> (N, ..., C_t, ...)."""
        if self.dim == 1 and x.ndim == 4:
            return F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return F.linear(x.movedim(self.dim, -1), self.weight, self.bias).movedim(-1, self.dim)

    def cut(self, keep: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Read these of the student's channels only; the optimizer's state follows."""
        keep = keep.to(self.weight.device)
        of = self.weight.shape
        if optimizer is not None:
            state = optimizer.state.get(self.weight, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == of:
                    state[name] = value.index_select(1, keep)
        self.weight.grad = None
        replace_data(self.weight, self.weight.data.index_select(1, keep))

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Weights of a stored state, whatever their shapes."""
        for name, p in self.named_parameters():
            replace_data(p, state[name].to(p.device).clone())


def channel_dim(
    student: Sequence[int], teacher: Sequence[int], labelled: Sequence[int] = ()
) -> int | None:
    """The dim of the channels: the only one in which two outputs may differ; None if others do.

    Where both are of one shape it is one of `labelled` (dims whose indices a cut can remove), else
    the last of (N, tokens, width), else the second.

    >>> channel_dim((2, 8, 4, 4), (2, 16, 4, 4))
    1
    """
    if len(student) != len(teacher) or len(student) < 2:
        return None
    n = len(student)
    order = (n - 1, 1) if n == 3 else (1, n - 1)
    fits = [
        d
        for d in order
        if all(a == b for k, (a, b) in enumerate(zip(student, teacher, strict=True)) if k != d)
    ]
    return next((d for d in fits if d in labelled), fits[0] if fits else None)
