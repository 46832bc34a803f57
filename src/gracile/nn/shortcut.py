"""The parameter-free shortcut of ResNet (option A): subsample in space, pad with zero channels.

He et al. 2015, arXiv:1512.03385, section 3.3. Kept as a module with an explicit channel map, so
that surgery can cut channels on either side of it without touching anyone's forward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelPad(nn.Module):
    """Put zero channels before and behind the input's, and keep every `stride`-th pixel.

    ``out = pad(x[:, :, ::stride, ::stride])``: (N, in_channels, H, W) -> (N, front + in_channels +
    back, ceil(H/stride), ceil(W/stride)).

    Attributes:
        source: for each output channel the input channel it copies, -1 for zeros. This is the whole
            state; surgery edits it, and afterwards it need not be contiguous.
        in_channels: channels of the input.
        stride: step in both spatial dimensions.

    Args:
        in_channels: channels of the input.
        front: zero channels before them.
        back: zero channels behind them.
        stride: step in both spatial dimensions.

    Raises:
        ValueError: a count is negative, or `in_channels` or `stride` is 0.

    >>> ChannelPad(2, front=1, back=1).source
    [-1, 0, 1, -1]
    """

    def __init__(self, in_channels: int, front: int = 0, back: int = 0, stride: int = 1):
        super().__init__()
        if in_channels < 1 or stride < 1 or front < 0 or back < 0:
            raise ValueError(
                "ChannelPad needs in_channels >= 1, stride >= 1, front >= 0 and back >= 0, got "
                f"in_channels={in_channels}, front={front}, back={back}, stride={stride}."
            )
        self.in_channels = in_channels
        self.stride = stride
        self.source = [-1] * front + list(range(in_channels)) + [-1] * back

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return len(self.source)

    @property
    def front(self) -> int:
        """Zero channels before the first copied one."""
        return next((j for j, i in enumerate(self.source) if i >= 0), len(self.source))

    @property
    def back(self) -> int:
        """Zero channels behind the last copied one."""
        return next((j for j, i in enumerate(reversed(self.source)) if i >= 0), 0)

    @property
    def contiguous(self) -> bool:
        """Whether the output is all input channels in order with zeros around: a plain padding."""
        middle = self.source[self.front : len(self.source) - self.back]
        return middle == list(range(self.in_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.contiguous:
            return F.pad(x, (0, 0, 0, 0, self.front, self.back))
        padded = F.pad(x, (0, 0, 0, 0, 0, 1))  # one zero channel at the end, for the -1 entries
        index = [i if i >= 0 else self.in_channels for i in self.source]
        return padded.index_select(1, torch.tensor(index, device=x.device))

    def cut(self, dim: int, keep: Sequence[int]) -> None:
        """Keep only these output (dim 0) or input (dim 1) channels, in place."""
        if dim == 0:
            self.source = [self.source[j] for j in keep]
        else:
            place = {i: k for k, i in enumerate(keep)}
            self.source = [place.get(i, -1) for i in self.source]
            self.in_channels = len(keep)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_channels}, front={self.front}, back={self.back}, stride={self.stride}"
