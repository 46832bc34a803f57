"""The activation quantizer that stays in a quantized model."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gracile.errors import UserError
from gracile.nn.rounding import dynamic_grid, fake_quantize

Mode = Literal["off", "observe", "quantize"]
Rule = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]  # as `fake_quantize`


class ActivationQuantizer(nn.Module):
    """Quantizes the tensor it is called on; laid on a captured graph by `graph.instrument`.

    `scale` (float32) and `zero_point` (int32) are buffers and so part of a checkpoint. `mode` and
    `observer` are not: "off" passes tensors through, "observe" also shows them to `observer`,
    "quantize" applies `rule` (by default `fake_quantize`).

    With `dynamic` each tensor it is called on has the grid of its own range (`dynamic_grid`), and
    the buffers are not used.

    Raises:
        ValueError: bits outside 1..16, a narrow range without a sign, or a dynamic one with a sign.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        bits: int = 8,
        *,
        signed: bool = False,
        symmetric: bool = False,
        narrow: bool = False,
        dynamic: bool = False,
    ):
        super().__init__()
        if not 1 <= bits <= 16:
            raise ValueError(f"bits of an activation must be in 1..16, got {bits}.")
        if narrow and not signed:
            raise ValueError("narrow leaves out the most negative integer; it needs signed=True.")
        if dynamic and (signed or symmetric):
            raise ValueError("a grid that is found at run time is unsigned with a zero point.")
        self.bits, self.signed, self.symmetric, self.narrow = bits, signed, symmetric, narrow
        self.dynamic = dynamic
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.mode: Mode = "off"
        self.rule: Rule = fake_quantize
        self.observer: Any = None  # an object with observe(x)

    @property
    def qmin(self) -> int:
        """Smallest integer on the grid."""
        return -(1 << self.bits - 1) + self.narrow if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer on the grid."""
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep an observer out of the submodules, whatever it is: it must not be saved."""
        if name == "observer":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """The tensor itself ("off", "observe") or on its grid ("quantize")."""
        if self.mode == "quantize":
            own = dynamic_grid(x, self.qmax) if self.dynamic else (self.scale, self.zero_point)
            return self.rule(x, *own, self.qmin, self.qmax)
        if self.mode == "observe":
            if self.observer is None:
                raise UserError("an ActivationQuantizer in mode 'observe' needs an observer.")
            self.observer.observe(x.detach())
        return x

    def extra_repr(self) -> str:
        """What print() shows."""
        sign = "int" if self.signed else "uint"
        scale = "dynamic" if self.dynamic else f"{float(self.scale):.4g}"
        return f"{sign}{self.bits}, mode={self.mode}, scale={scale}"
