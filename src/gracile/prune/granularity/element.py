"""Fine-grained pruning: every weight on its own. Smaller on disk; dense runtimes gain no time."""

import torch
from torch import Tensor

from gracile.core.kinds import granularity


@granularity("element", source="Han et al. 2015, arXiv:1506.02626")
def element(shape: tuple[int, ...]) -> Tensor:
    """Each entry is its own group.

    >>> element((2, 2))
    tensor([[0, 1],
            [2, 3]])
    """
    n = 1
    for size in shape:
        n *= size
    return torch.arange(n).reshape(shape)
