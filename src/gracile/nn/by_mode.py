"""A number that is one thing in train mode and another in eval mode, as a module."""

from torch import nn


class ByMode(nn.Module):
    """What `p if self.training else 0.0` is in a captured graph: it follows `train()` and `eval()`.

    Args:
        train: the value in train mode.
        eval: the value in eval mode.

    >>> ByMode(0.1, 0.0).eval()()
    0.0
    """

    def __init__(self, train: float | bool | None, eval: float | bool | None):
        super().__init__()
        self.values = {True: train, False: eval}

    def forward(self) -> float | bool | None:
        """The value of the mode that this module is in."""
        return self.values[self.training]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"train={self.values[True]}, eval={self.values[False]}"
