"""Tucker-2: fewer channels into and out of a convolution of the same kernel."""

import torch
from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.errors import UserError
from gracile.lowrank.spectral import by_group, leading
from gracile.nn.chain import Chain, Layer


def _full(layer: Layer) -> tuple[int, int]:
    if not layer.kernel:
        raise UserError("tucker2 is for convolutions; use svd for a linear layer.")
    return layer.inputs // layer.groups, layer.outputs // layer.groups


def _chain(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    first, last = (r * layer.groups for r in ranks)
    return Chain(
        (
            layer.like(layer.inputs, first, groups=layer.groups),
            layer.like(first, last, axes=layer.axes, groups=layer.groups),
            layer.like(last, layer.outputs, groups=layer.groups, bias=layer.bias),
        )
    )


def _matrices(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Unfolded along the inputs, and along the outputs."""
    each = by_group(weight, groups)
    return each.transpose(1, 2).flatten(2), each.flatten(2)


def along(layer: Layer, t: int) -> tuple[int, int]:
    """R3 = t and R4 = beta R3 with beta = max(0.8 outputs / inputs, 1), within the full ranks."""
    inputs, outputs = _full(layer)
    beta = max(0.8 * outputs / inputs, 1.0)
    return min(t, inputs), max(1, min(int(beta * t), outputs))


@factorizer(
    "tucker2",
    source="Kim et al. 2016, arXiv:1511.06530; HOOI of De Lathauwer et al. 2000",
    ranks=("inputs", "outputs"),
    full=_full,
    chain=_chain,
    matrices=_matrices,
    along=along,
)
def tucker2(
    weight: Tensor, groups: int, ranks: tuple[int, ...], *, sweeps: int = 20
) -> tuple[Tensor, ...]:
    """1x1 into R3 channels, the kernel from R3 to R4, 1x1 out of R4: S R3 + R3 R4 k^2 + T R4.

    The channels kept are the leading singular vectors of the weight unfolded along each mode
    (HOSVD), then in turn those of the weight already projected on the other (HOOI), which never
    makes the error larger.

    Args:
        weight: (O, I / groups, *kernel).
        groups: of the layer.
        ranks: (R3, R4), channels of each group.
        sweeps: of HOOI, at most; 0 is HOSVD.

    Returns:
        (R3 x groups, I / groups, 1...), (R4 x groups, R3, *kernel), (O, R4, 1...).
    """
    each = by_group(weight, groups).flatten(3)  # (G, O / G, I / G, kernel)
    by_inputs, by_outputs = _matrices(weight, groups)
    inputs, outputs = leading(by_inputs, ranks[0]), leading(by_outputs, ranks[1])
    core = _core(each, inputs, outputs)
    kept = float(core.square().sum())
    for _ in range(sweeps):
        part = torch.einsum("gosk,gsr->gork", each, inputs).flatten(2)
        new_outputs = leading(part, ranks[1])
        part = torch.einsum("gosk,gor->gsrk", each, new_outputs).flatten(2)
        new_inputs = leading(part, ranks[0])
        new_core = _core(each, new_inputs, new_outputs)
        now = float(new_core.square().sum())
        if now <= kept * (1 + 1e-12):
            break
        inputs, outputs, core, kept = new_inputs, new_outputs, new_core, now
    ones = (1,) * (weight.ndim - 2)
    first = inputs.mT.reshape(-1, inputs.shape[1], *ones)
    middle = core.reshape(-1, ranks[0], *weight.shape[2:])
    last = outputs.reshape(len(weight), -1, *ones)
    return first.to(weight.dtype), middle.to(weight.dtype), last.to(weight.dtype)


def _core(each: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """(G, R4, R3, kernel)."""
    return torch.einsum("gosk,gsr,gop->gprk", each, inputs, outputs)
