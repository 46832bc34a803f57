"""Weights of a chain that are nearest to those of the layer it stands for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gracile.lowrank.reconstruct import reconstruct
from gracile.lowrank.spectral import by_group
from gracile.nn.chain import Chain, Layer


def fitted(
    weight: Tensor, layer: Layer, chain: Chain, factors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Least squares of the product to the weight, from these factors; the error never grows.

    Args:
        weight: (O, I / groups, *kernel).
        layer: what has it.
        chain: what stands for the layer.
        factors: where to begin.
    """
    rows = by_group(weight, layer.groups).flatten(2)  # (G, O / G, P): as if all inputs were white
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return reconstruct(chain, factors, layer, eye.expand(layer.groups, -1, -1), rows.mT)
