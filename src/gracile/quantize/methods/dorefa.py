"""DoReFa: weights squeezed by tanh, activations clipped to [0, 1], gradients rounded with noise."""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gracile.core.method import method
from gracile.core.plan import Bits
from gracile.quantize.clipped import SqueezedOptions, SqueezedQuantizer
from gracile.quantize.dorefa import rounded_gradient

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


class DorefaOptions(SqueezedOptions):
    """Options of `quantize: dorefa`, added to `SqueezedOptions`.

    Attributes:
        clip: activations that cannot be negative are clipped to [0, clip].
        gradient_bits: of the gradient of what a quantized layer gives; default not rounded.
    """

    clip: float = Field(default=1.0, gt=0)
    gradient_bits: int | None = Field(default=None, ge=1, le=16)


@method("quantize", "dorefa", source="Zhou et al. 2016, arXiv:1606.06160")
class Dorefa(SqueezedQuantizer):
    """Train with few bits of weights, activations and, if asked for, gradients."""

    Options = DorefaOptions

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self._hooks: list[Any] = []
        self._noise: torch.Generator | None = None

    def clip(self) -> float:
        return float(self.options.clip)

    def lay(self, s: Any, placement: Any = None) -> None:
        super().lay(s, placement)
        if self.options.gradient_bits is None:
            return
        for spec in self._weights():
            layer = s.model.get_submodule(spec.address.rpartition(".")[0])
            if isinstance(layer, LAYERS):
                self._hooks.append(layer.register_forward_hook(self._rounding()))
            else:
                s.warn(
                    "float-gradient",
                    f"'{self.id}': {spec.address} is not read by a layer of its own, so its "
                    "gradient is not rounded.",
                )

    def on_batch_start(self, s: Any) -> None:
        super().on_batch_start(s)
        if self.laid and self.options.gradient_bits is not None:
            seed = s.generator(self.id, "gradient", s.epoch_number, s.batch).initial_seed()
            self._noise = torch.Generator(s.device).manual_seed(seed)

    def on_batch_end(self, s: Any) -> None:
        super().on_batch_end(s)
        self._noise = None

    def on_detach(self, s: Any) -> Iterable[Bits]:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        edits: Iterable[Bits] = super().on_detach(s)
        return edits

    def _rounding(self) -> Any:
        def rounded(grad: Tensor) -> Tensor | None:
            if self._noise is None:
                return None
            noise = torch.rand(grad.shape, generator=self._noise, device=grad.device) - 0.5
            return rounded_gradient(grad, self.options.gradient_bits, noise.to(grad.dtype))

        # A plain function, which copies of the model share instead of copying what it holds.
        def watch(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(rounded)

        return watch
