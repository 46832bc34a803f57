"""Where a pattern of zeros or widths brings no speed: what `recipe simulate` warns of.

The facts are measured, see docs/targets: zeros are multiplied like any other number, and float
convolutions work on blocks of 16 channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gracile.benchmark.processor import BLOCK

BLOCKWISE = ("onnxruntime", "openvino")
SHOWN = 3


def filters(s: Any) -> dict[str, int]:
    """Weight of each convolution -> its filters, in the model as it is now."""
    names = s.parameter_names
    found = [n.params.get("weight") for n in s.graph.of_op("conv")]
    return {a: s.parameter(a).shape[0] for a in found if a in names}


def speed_warnings(
    s: Any, runtimes: Sequence[str], before: Mapping[str, int]
) -> list[tuple[str, str]]:
    """(code, text) of what was pruned and makes nothing faster, for each runtime.

    Args:
        s: the Session at its end, masks still laid.
        runtimes: their names.
        before: `filters` of the original.
    """
    if not runtimes:
        return []
    channels, share = uncut(s)
    uneven = {a: n for a, n in filters(s).items() if n != before.get(a, n) and n % BLOCK}
    out = []
    for name in dict.fromkeys(runtimes):
        if channels:
            out.append(
                (
                    "channels-not-cut",
                    f"{name} computes {channels} channels that are masked as a whole; "
                    "{prune: thin, when: {at: end}} behind the pruning cuts them.",
                )
            )
        if share:
            out.append(
                (
                    "zeros-no-speed",
                    f"{100 * share:.1f} % of the weights are masked in no whole channel; {name} "
                    "multiplies zeros like any other number. For time, cut filters.",
                )
            )
        if uneven and name in BLOCKWISE:
            some = ", ".join(f"{a}: {n}" for a, n in [*uneven.items()][:SHOWN])
            out.append(
                (
                    "uneven-widths",
                    f"{len(uneven)} convolutions were cut to no multiple of {BLOCK} filters "
                    f"({some}{', ...' if len(uneven) > SHOWN else ''}); float kernels of {name} "
                    f"cost about as much as for the next one. multiple_of: {BLOCK} keeps to them.",
                )
            )
    return out


def uncut(s: Any) -> tuple[int, float]:
    """Channels that are masked as a whole, and the share of weights masked in none of those."""
    hidden: dict[str, Tensor] = {}
    channels = 0
    masks = {a: s.mask(a) for a in s.parameter_names}
    for g in s.groups if any(m is not None for m in masks.values()) else ():
        axes = {axis: np.asarray(of) for axis, of in g.layout.items() if axis[0] in masks}
        gone = np.ones(len(g.units), dtype=bool)
        for (a, dim), of in axes.items():
            kept = np.ones(len(of), dtype=bool)
            if masks[a] is not None:
                kept = masks[a].movedim(dim, 0).reshape(len(of), -1).any(1).numpy()
            gone[of[kept & (of >= 0)]] = False
        if g.protected is not None or gone.all() or not gone.any():
            continue
        channels += int(gone.sum())
        for (a, dim), of in axes.items():
            index = np.flatnonzero((of >= 0) & gone[of])
            if len(index):
                cut = hidden.setdefault(a, torch.zeros_like(masks[a]))
                cut.index_fill_(dim, torch.from_numpy(index), True)
    rest = total = 0
    for a, p in s.model.named_parameters():
        if p.dim() > 1:
            total += p.numel()
            if masks[a] is not None:
                rest += int((~masks[a] & ~hidden.get(a, torch.zeros_like(masks[a]))).sum())
    return channels, rest / total if total else 0.0
