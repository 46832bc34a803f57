"""Whole channels and heads that masks hide: what can be cut without changing the function."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from gracile.graph.dependency import ChannelGroup, Slice, mask_units, removable_together
from gracile.graph.labels import Shape
from gracile.prune.structure import candidates


def masked_units(
    group: ChannelGroup, masks: Mapping[str, Tensor | None], addresses: Collection[str]
) -> list[int]:
    """Units of a group whose slices are masked throughout.

    Args:
        group: of channels.
        masks: address -> keep-mask; what is not there hides nothing.
        addresses: the tensors that must agree; slices of others (buffers) are not asked.
    """
    out = []
    for u, unit in enumerate(group.units):
        slices = [p for p in unit if p.at in addresses]
        if slices and all(_hidden(masks.get(p.at), p) for p in slices):
            out.append(u)
    return out


def whole_units(
    groups: Sequence[ChannelGroup], masks: Mapping[str, Tensor], shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """Masks of whole units in the place of masks that may have holes anywhere.

    A unit goes if the masks hide it in every weight that writes or reads it; then all that belongs
    to it is masked (biases, normalization), so that `prune: thin` can cut it and nothing changes.
    What the masks hide elsewhere in these weights is given back. Weights without such channels or
    heads keep their masks (NNCF, structured masking after Lagunas et al. 2021, arXiv:2109.04838).

    Args:
        groups: all groups of the model; of whole heads and the width in each head only the heads
            count, and only groups whose weights all have a mask.
        masks: address -> keep-mask of a weight.
        shapes: of all parameters.

    Returns:
        address -> keep-mask, for more tensors than were given.
    """
    able = [g for g in candidates(groups) if {*g.producers, *g.consumers} <= masks.keys()]
    wanted = {g.id: masked_units(g, masks, {*g.producers, *g.consumers}) for g in able}
    out = dict(masks)
    for address in {a for g in able for a in (*g.producers, *g.consumers)}:
        out[address] = torch.ones(shapes[address], dtype=torch.bool)
    possible = removable_together(groups, wanted)
    for g in able:
        mask_units(out, g, possible.get(g.id, ()), shapes)
    return out


def _hidden(mask: Tensor | None, part: Slice) -> bool:
    if mask is None:
        return False
    return not bool(mask.index_select(part.dim, torch.tensor(part.index)).any())
