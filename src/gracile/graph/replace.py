"""Put a block in the place of a layer or head, and prove that it sits where that sat."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracile.core.plan import Replace
from gracile.errors import UserError, VerificationError, nearest
from gracile.graph import verify
from gracile.graph.capture import bare_copy
from gracile.graph.factorize import Factors, Inputs, put, refusal
from gracile.nn.blocks import block_of, build_block, linear_layers, standing_for


def refused_block(model: nn.Module, at: str) -> str | None:
    """Why a module cannot be replaced by a block; None if it is a layer or head that can."""
    known = dict(model.named_modules())
    if not isinstance(known.get(at), nn.Sequential):
        return refusal(model, at)
    inside = {id(p) for p in known[at].parameters()}
    layers = linear_layers(known[at])
    if not layers:
        return "only linear layers with activations and dropouts between are one head"
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in inside and not name.startswith(f"{at}."):
            return f"one of its weights is also '{name}'"
    return None


def replaced(
    model: nn.Module,
    edits: Sequence[Replace],
    tensors: Factors | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Put blocks in the place of layers, in place.

    Args:
        model: changed in place.
        edits: which, in order.
        tensors: path of a layer -> those of the block's state dict, in order; None leaves weights
            zero, to be loaded.
        optimizer: new parameters join the group of the old one, whose state is forgotten.

    Raises:
        UserError: no such layer, one that cannot be replaced, or a block that is not for it.
    """
    for edit in edits:
        put(model, edit.at, _made(model, edit, tensors), optimizer)
    return model


def prove_replacement(
    model: nn.Module, edits: Sequence[Replace], tensors: Factors, examples: Sequence[Inputs]
) -> verify.Proof:
    """Compare with a network whose layers run as ever and then hand on what the blocks give.

    What is proven is that the blocks give tensors of the layers' shapes, in eval and train mode,
    and that nothing else in the forward changes. A block does not compute what its layer did.

    Raises:
        UserError: see `replaced`.
        VerificationError: the two differ, or shapes do.
    """
    whole: nn.Module = bare_copy(model)
    dtype, whole, inputs = verify.to_compare(whole, examples)
    if dtype == torch.float64:
        tensors = {at: [_double(t) for t in ts] for at, ts in tensors.items()}
    blocks = replaced(bare_copy(whole), edits, tensors)
    for edit in edits:
        _stand_in(whole.get_submodule(edit.at), _made(whole, edit, tensors))
    try:
        worst, checks = verify._compare(whole, blocks, [], inputs, dtype)
    except verify._Different as e:
        names = ", ".join(f"'{edit.at}'" for edit in edits)
        mode = "train" if e.training else "eval"
        raise VerificationError(
            f"replacing {names} changed more than these layers, in {mode} mode: {e}. The model was "
            "left as it was; leave these layers out, if the forward reads them by itself."
        ) from None
    tolerance = verify.TOLERANCE[dtype]
    return verify.Proof(str(dtype).removeprefix("torch."), worst, tolerance, checks)


def _made(model: nn.Module, edit: Replace, tensors: Factors | None) -> nn.Sequential:
    if (why := refused_block(model, edit.at)) is not None:
        known = [p for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        raise UserError(
            f"'{edit.at}' cannot be replaced: {why.rstrip('.')}.{nearest(edit.at, known)}"
        )
    module = model.get_submodule(edit.at)
    block = block_of(edit.with_, standing_for(module), edit.args)
    ours = build_block(block, dtype=next(module.parameters()).dtype)
    if tensors is not None:
        names = list(ours.state_dict())
        if len(tensors[edit.at]) != len(names):
            raise UserError(
                f"'{edit.at}': a block '{edit.with_}' has {len(names)} tensors, got "
                f"{len(tensors[edit.at])}."
            )
        ours.load_state_dict(dict(zip(names, tensors[edit.at], strict=True)))
    return ours


def _stand_in(module: nn.Module, ours: nn.Sequential) -> None:
    """Let a layer hand on what a block gives for the same input."""

    def handed_on(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        out: Tensor = ours.train(module.training)(*args)
        if out.shape != output.shape:
            raise UserError(f"the block gives {tuple(out.shape)} for {tuple(output.shape)}")
        return out

    ours.to(next(module.parameters()).device)
    if any(True for _ in ours.buffers()):  # compared after a step, by their names
        for name, child in ours.named_children():
            module.add_module(name, child)
    module.register_forward_hook(handed_on)


def _double(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x.detach()
