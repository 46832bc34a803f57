"""Keep module calls whole while torch.export looks: one opaque operator for each call.

torch.export dissolves every module into aten operators. While `leaf_calls` lasts, the chosen
modules' forwards are replaced by `torch.ops.gracile.leaf`, which export records as one node; which
module it was, with which arguments and what structure of results, is kept beside it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_LIBRARY = torch.library.Library("gracile", "FRAGMENT")
_LIBRARY.define("leaf(Tensor[] tensors, SymInt[] numbers, int call) -> Tensor[]")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format)


@dataclass
class LeafCall:
    """One call of a module that stays whole.

    Attributes:
        path: of the module.
        forward: its own forward.
        leaves: flat arguments; tensors and computed sizes among them come from the node.
        spec: how the leaves make up (args, kwargs).
        results: for each tensor that it returns, the way to it in the returned structure.
        returned: (leaves, spec) of what it returned, until they are handed on.
    """

    path: str
    forward: Callable[..., Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    results: list[pytree.KeyPath] = field(default_factory=list)
    returned: Any = None

    def arguments(self, tensors: Sequence[Any], numbers: Sequence[Any]) -> tuple[Any, Any]:
        """(args, kwargs) of the call with these in the places of tensors and computed sizes."""
        t, n = iter(tensors), iter(numbers)
        filled = [
            next(t) if isinstance(v, Tensor) else next(n) if isinstance(v, torch.SymInt) else v
            for v in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        return args, kwargs


class _State:
    """The calls of the export that runs now, and whether a whole module runs inside."""

    calls: list[LeafCall]
    inside = False


_state = _State()


@contextmanager
def leaf_calls(model: nn.Module, paths: Collection[str]) -> Iterator[list[LeafCall]]:
    """Modules at these paths stay whole for as long as this lasts.

    Yields:
        the calls, filled while the model runs; the operator's last argument indexes this list.
    """
    _state.calls, _state.inside = [], False
    held: list[tuple[nn.Module, Any]] = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            held.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _opaque(path, module.forward)
        yield _state.calls
    finally:
        _state.calls = []
        for module, forward in held:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _opaque(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        known = all(isinstance(v, (Tensor, torch.SymInt, *_PLAIN)) for v in leaves)
        if _state.inside or not known:  # an object may hide tensors: let export look inside
            return forward(*args, **kwargs)
        it = LeafCall(path, forward, leaves, spec)
        _state.calls.append(it)
        tensors = [v for v in leaves if isinstance(v, Tensor)]
        numbers = [v for v in leaves if isinstance(v, torch.SymInt)]
        made = iter(torch.ops.gracile.leaf(tensors, numbers, len(_state.calls) - 1))
        leaves, spec = it.returned
        it.returned = None
        return pytree.tree_unflatten(
            [next(made) if isinstance(v, Tensor) else v for v in leaves], spec
        )

    return call


@torch.library.register_fake("gracile::leaf", lib=_LIBRARY)
def _leaf(tensors: list[Tensor], numbers: list[Any], call: int) -> list[Tensor]:
    """Run the module on shapes only; hand out tensors of its results' shapes."""
    it = _state.calls[call]
    args, kwargs = it.arguments(tensors, numbers)
    _state.inside = True
    try:
        out = it.forward(*args, **kwargs)
    finally:
        _state.inside = False
    pairs, spec = pytree.tree_flatten_with_path(out)
    for _, v in pairs:
        if not isinstance(v, (Tensor, *_PLAIN)):
            raise TypeError(f"'{it.path}' returns a {type(v).__name__}")
    it.results = [path for path, v in pairs if isinstance(v, Tensor)]
    it.returned = ([v for _, v in pairs], spec)
    return [
        torch.empty_strided(v.size(), v.stride(), dtype=v.dtype, device=v.device)
        for _, v in pairs
        if isinstance(v, Tensor)
    ]
