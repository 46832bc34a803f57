"""Denton's first layer: each filter sees one of a few mixtures of the input's colours."""

import torch
from torch import Tensor

from gracile.core.kinds import factorizer
from gracile.errors import UserError
from gracile.lowrank.clusters import equal_kmeans, settled
from gracile.lowrank.spectral import leading
from gracile.nn.chain import Chain, Layer, Reorder


def _full(layer: Layer) -> tuple[int]:
    if layer.groups > 1 or layer.area == 1:
        raise UserError(
            "monochromatic is for convolutions of one group with a spatial kernel, got "
            f"{layer.groups} groups and kernel {layer.kernel}; use svd or scheme1."
        )
    return (layer.outputs,)


def _chain(layer: Layer, ranks: tuple[int, ...]) -> Chain:
    (colours,) = ranks
    if layer.outputs % colours:
        raise UserError(
            f"the number of colours must divide the {layer.outputs} filters, got {colours}. "
            f"Nearest below: {along(layer, colours)[0]}."
        )
    return Chain(
        (
            layer.like(layer.inputs, colours),
            layer.like(colours, layer.outputs, axes=layer.axes, groups=colours, bias=layer.bias),
            Reorder(layer.outputs),
        )
    )


def along(layer: Layer, t: int) -> tuple[int]:
    """The largest number of colours up to t that divides the filters."""
    return (max(n for n in range(1, min(t, layer.outputs) + 1) if layer.outputs % n == 0),)


@factorizer(
    "monochromatic",
    source="Denton et al. 2014, arXiv:1404.0736 (monochromatic)",
    ranks=("colours",),
    full=_full,
    chain=_chain,
    along=along,
    needs=("generator",),
)
def monochromatic(
    weight: Tensor,
    groups: int,
    ranks: tuple[int, ...],
    generator: torch.Generator,
    *,
    starts: int = 4,
) -> tuple[Tensor, ...]:
    """1x1 into C' colours, a grouped convolution that reads one colour for each filter.

    A filter (C, kernel) is cut to rank one, its colour is the left vector, and colours are put
    into clusters of equal sizes. Beyond the paper, clusters are then improved on the error itself:
    a cluster's colour is the best one for all its filters, and filters change places while that
    lowers the error. Exact only for filters of rank one, however many colours.

    Args:
        weight: (O, I, *kernel).
        groups: 1.
        ranks: (C',), divides O.
        generator: of the starts of k-means.
        starts: of k-means; the best is taken.

    Returns:
        (C', I, 1...), (O, 1, *kernel) with the filters of a colour side by side, and the order
        (O,) that puts them back.
    """
    (colours,) = ranks
    filters = weight.detach().double().flatten(2)  # (O, I, kernel)
    # The clustered vectors are those of largest variance; a colour and its negative are one.
    vectors = leading(filters, 1).squeeze(-1)
    labels = equal_kmeans(vectors, colours, generator, starts=starts)

    def palette(now: Tensor) -> Tensor:
        members = [filters[now == c].transpose(0, 1).flatten(1) for c in range(colours)]
        return torch.cat([leading(m, 1) for m in members], 1)  # (I, C')

    def lost(now: Tensor) -> Tensor:
        return -torch.einsum("oik,ic->ock", filters, palette(now)).square().sum(2)

    labels = settled(labels, lost)
    palette_ = palette(labels)
    order = labels.argsort(stable=True)
    shown = torch.einsum("oik,io->ok", filters, palette_[:, labels])[order]
    ones = (1,) * (weight.ndim - 2)
    first = palette_.T.reshape(colours, -1, *ones)
    second = shown.reshape(len(weight), 1, *weight.shape[2:])
    return first.to(weight.dtype), second.to(weight.dtype), order.argsort()
