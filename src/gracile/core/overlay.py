"""Overlays: what a weight looks like while a method acts on it, without touching the weight.

An overlay is a function of the stored tensor (multiply by a mask, round to a grid). All overlays of
a model are laid when its forward starts and taken off when it ends: each weight is computed once a
forward, wherever it is read from (its module, another module, a tied name, a graph attribute).
Between forwards the model is exactly the user's: plain names, plain classes, plain copies.

`torch.nn.utils.parametrize` was the alternative; it renames parameters, changes classes and breaks
deep copies. The price here: a submodule called by hand, outside the model's forward, does not see
the overlays; use `effective()`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Laid = Callable[[Tensor], Tensor]
ORDER = ("gate", "mask", "share", "quantize")  # a quantizer sees the masked weight


class Overlays:
    """The overlays of one model. `attach` once; `set` and `remove` at any time between forwards."""

    def __init__(self, model: nn.Module, layers: dict[str, dict[str, Laid]] | None = None):
        self.model = model
        self._layers: dict[str, dict[str, Laid]] = layers if layers is not None else {}
        self._laid: list[tuple[dict[str, Any], str]] = []
        self._depth = 0
        self._hooks = [
            model.register_forward_pre_hook(self._lay),
            model.register_forward_hook(self._take_off, always_call=True),
        ]

    def set(self, address: str, layer: str, fn: Laid) -> None:
        """Lay `fn` on a parameter as one of the layers in `ORDER`; replaces that layer."""
        self.model.get_parameter(address)  # raises AttributeError for a wrong address
        if layer not in ORDER:
            raise ValueError(f"overlay layer must be one of {ORDER}, got '{layer}'")
        stack = {**self._layers.get(address, {}), layer: fn}
        self._layers[address] = {k: stack[k] for k in ORDER if k in stack}

    def remove(self, address: str, layer: str) -> None:
        """Take one layer off; nothing happens if it is not there."""
        stack = self._layers.get(address, {})
        stack.pop(layer, None)
        if not stack:
            self._layers.pop(address, None)

    def get(self, address: str, layer: str) -> Laid | None:
        """The function laid on an address, or None."""
        return self._layers.get(address, {}).get(layer)

    def addresses(self, layer: str | None = None) -> list[str]:
        """Addresses that carry an overlay (of that layer)."""
        return [a for a, stack in self._layers.items() if layer is None or layer in stack]

    def effective(self, address: str, upto: str | None = None) -> Tensor:
        """The tensor the forward uses: stored value through all overlays (up to one layer)."""
        value: Tensor = self.model.get_parameter(address)
        wanted = ORDER if upto is None else ORDER[: ORDER.index(upto) + 1]
        for layer, fn in self._layers.get(address, {}).items():
            if layer in wanted:
                value = fn(value)
        return value

    @contextmanager
    def laid(self, module: nn.Module) -> Iterator[None]:
        """Lay everything on another module that shares these parameters, while this lasts."""
        other = Overlays(module, self._layers)
        other._lay(module, ())
        try:
            yield
        finally:
            other._take_off(module, (), None)
            other.pause()

    def pause(self) -> dict[str, dict[str, Laid]]:
        """Remove the hooks and hand the layers over, for `Overlays(model, layers)` later."""
        for hook in self._hooks:
            hook.remove()
        return self._layers

    def detach(self) -> None:
        """Remove the hooks and forget the layers; the model is as it was before."""
        self.pause()
        self._layers = {}

    # One value per parameter object: tied names share it, so gradients add up as they should.
    def _lay(self, _model: nn.Module, _args: Any) -> None:
        self._depth += 1
        if self._depth > 1 or not self._layers:
            return
        values: dict[int, Tensor] = {}
        for address in self._layers:
            values.setdefault(id(self.model.get_parameter(address)), self.effective(address))
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in values:
                    value = values[id(parameter)]
                    module.__dict__[name] = value  # found before _parameters on look-up
                    self._laid.append((module.__dict__, name))
                    _swap_flat(module, name, value)

    def _take_off(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        for attributes, name in self._laid:
            attributes.pop(name, None)
        flat = {id(d) for d, _ in self._laid}
        for module in self.model.modules():
            if id(module.__dict__) in flat:
                _swap_flat(module, None, None)
        self._laid.clear()


def _swap_flat(module: nn.Module, name: str | None, value: Tensor | None) -> None:
    # Recurrent modules read their weights from a list made at construction.
    names: Any = getattr(module, "_flat_weights_names", None)
    flat: Any = getattr(module, "_flat_weights", None)
    for i, n in enumerate(names or ()):
        if name is None:
            flat[i] = module._parameters[n]
        elif n == name:
            flat[i] = value
