"""Whether two modules that share their tensors compute the same: outputs, gradients, buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def repeatable() -> Iterator[None]:
    """The same random numbers every time, without touching anyone's generators."""
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if ready else []):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach a sleeping GPU
        if ready:
            torch.cuda.manual_seed_all(0)
        yield


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer back afterwards, the tensor as well as its values."""
    held = [
        (m, name, b, b.detach().clone())
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for m, name, buffer, values in held:
                m._buffers[name] = buffer
                if buffer.grad_fn is not None:  # written to with gradients on
                    buffer.detach_()
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def same(expected: Any, got: Any) -> bool:
    """Whether two structures hold equal values, tensors up to rounding."""
    a, b = pytree.tree_leaves(expected), pytree.tree_leaves(got)
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            if not isinstance(y, Tensor) or x.shape != y.shape:
                return False
            if not torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
                return False
        elif isinstance(y, Tensor) or x != y:
            return False
    return True


def first_disagreement(
    model: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...], training: bool
) -> str | None:
    """What differs between a model and its captured module in one mode; None if nothing does.

    In train mode both draw the same random numbers, and the gradients of all parameters and the
    buffers after the step are compared as well. Modes are left changed, buffers are not.
    """
    names = [name for name, _ in model.named_buffers()]
    expected, got = (_behaviour(m, inputs, training, names) for m in (model, module))
    for what in expected:
        if not same(expected[what], got[what]):
            return what
    return None


def _behaviour(
    module: nn.Module, inputs: tuple[Tensor, ...], training: bool, names: list[str]
) -> dict[str, Any]:
    module.train(training)
    with restored_buffers(module), repeatable(), torch.set_grad_enabled(training):
        out = module(*inputs)
        if not training:
            return {"outputs": out}
        buffers = dict(module.named_buffers())
        after = [buffers[name].clone() for name in names]
        return {"outputs": out, "buffers": after, "gradients": _gradients(module, out)}


def _gradients(module: nn.Module, out: Any) -> list[Tensor | None]:
    outs = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor) and v.requires_grad]
    parameters = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
    if not outs or not parameters:
        return [None for _ in parameters]
    total = sum((_spread(v) for v in outs), torch.zeros((), device=outs[0].device))
    return list(torch.autograd.grad(total, parameters, allow_unused=True))


def _spread(x: Tensor) -> Tensor:
    # Unequal factors: the plain sum of a normalized tensor has no gradient.
    factors = torch.arange(x.numel(), device=x.device, dtype=torch.float64).cos()
    return (x.abs() if x.is_complex() else x).flatten().mul(factors.to(x.real.dtype)).sum().real
