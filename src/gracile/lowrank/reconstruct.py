"""Factors fitted to what a layer should give over data, from sums alone.

The squared error of a linear layer's responses is a quadratic function of its weight, known from
the Gram matrix of what it reads and the products with what it should give. A square root of the
Gram matrix is a set of patches with the same error for every weight, so factors are fitted to these
few patches, one factor after another, each a linear least-squares problem.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gracile.errors import UserError
from gracile.lowrank.spectral import square_root
from gracile.nn.chain import Chain, Layer
from gracile.nn.schemes import respond


def reconstruct(
    chain: Chain,
    factors: Sequence[Tensor],
    layer: Layer,
    gram: Tensor,
    cross: Tensor,
    *,
    sweeps: int = 4,
    steps: int = 20,
) -> tuple[Tensor, ...]:
    """Factors with the least sum of ||y - chain(x)||^2, from those given; it never grows.

    Layers are done front to back by the caller: x is then what the layer reads in the network
    factorized so far, y what it gives in the original one (without its bias).

    Args:
        chain: what stands for the layer.
        factors: where to begin, one for each of `chain.shapes`.
        layer: what the chain stands for.
        gram: (groups, P, P) sum of x x^T over patches in the order of the weight, P = inputs /
            groups x kernel; (P, P) for one group.
        cross: (groups, P, outputs / groups) sum of x y^T, over the same patches.
        sweeps: over all factors.
        steps: of conjugate gradients for each factor.

    Returns:
        Factors of the same shapes and dtypes; orders of channels stay.

    Raises:
        UserError: the sums have other shapes.

    Source:
        Jaderberg, Vedaldi & Zisserman 2014, arXiv:1405.3866 (data reconstruction), by
        alternating least squares in place of gradient descent.
    """
    patches, wanted = equivalent_data(layer, gram, cross)
    now = [f.detach().double() if f.is_floating_point() else f for f in factors]
    for _ in range(sweeps):
        for i, factor in enumerate(now):
            if factor.is_floating_point():
                now[i] = _least_squares(chain, now, i, patches, wanted, steps)
    return tuple(n.to(f.dtype) for n, f in zip(now, factors, strict=True))


def equivalent_data(layer: Layer, gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (P, inputs, *kernel) and responses (P, outputs) that have these sums.

    For every weight, the squared error on them differs from that on the data by a constant.

    Args:
        layer, gram, cross: see `reconstruct`.
    """
    size = (layer.inputs // layer.groups) * layer.area
    gram = grams_of(gram, layer.groups, size)
    shape = (layer.groups, size, layer.outputs // layer.groups)
    cross = cross.detach().double().reshape(-1, *cross.shape[-2:])
    if tuple(cross.shape) != shape:
        raise UserError(f"cross must have shape {shape}, got {tuple(cross.shape)}.")
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():  # inputs that are never seen apart
        root, inverse = square_root(gram)
        wanted = inverse @ cross
    else:
        wanted = torch.linalg.solve_triangular(root, cross, upper=False)  # (G, P, O / G)
    patches = root.mT.transpose(0, 1).reshape(size, layer.inputs, *layer.kernel)
    return patches, wanted.transpose(0, 1).reshape(size, layer.outputs)


def grams_of(gram: Tensor, groups: int, size: int) -> Tensor:
    """A Gram matrix for each group, in float64.

    Raises:
        UserError: it is not (groups, size, size), or (size, size) for one group.
    """
    found = gram.detach().double()
    found = found.unsqueeze(0) if found.ndim == 2 else found
    if tuple(found.shape) != (groups, size, size):
        raise UserError(
            f"gram must have shape {(groups, size, size)}, a matrix for each group over what one "
            f"output reads, got {tuple(gram.shape)}."
        )
    return found


def _least_squares(
    chain: Chain,
    factors: Sequence[Tensor],
    i: int,
    patches: Tensor,
    wanted: Tensor,
    steps: int,
) -> Tensor:
    """Conjugate gradients on the normal equations of one factor (CGLS)."""

    def forward(value: Tensor) -> Tensor:
        return respond(chain, [value if j == i else f for j, f in enumerate(factors)], patches)

    with torch.enable_grad():
        at = torch.zeros_like(factors[i], requires_grad=True)
        out = forward(at)  # linear, so its derivative is the same everywhere

    def backward(residual: Tensor) -> Tensor:
        return torch.autograd.grad(out, at, residual, retain_graph=True)[0]

    x = factors[i]
    residual = wanted - forward(x)
    slope = backward(residual)
    step, now = slope, float(slope.square().sum())
    floor = 1e-20 * now
    for _ in range(steps):
        if now <= floor or now == 0.0:
            break
        image = forward(step)
        length = now / float(image.square().sum())
        x, residual = x + length * step, residual - length * image
        slope = backward(residual)
        before, now = now, float(slope.square().sum())
        step = slope + now / before * step
    return x
