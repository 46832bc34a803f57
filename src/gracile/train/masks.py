"""Keep-masks on parameters: one per method and tensor, and a tensor keeps where all of them do."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gracile.core.overlay import Laid
from gracile.core.plan import Decompose, Exit, Factorize, Mask, Remove, Replace, Skip
from gracile.graph.depth import covers


class Masks:
    """address -> method id -> keep-mask (bool, shape of the parameter).

    Attributes:
        trained: ids of methods under whose masks weights go on getting their gradient; it passes
            where all methods that mask a tensor say so.
    """

    def __init__(self, stored: dict[str, dict[str, Tensor]] | None = None):
        self._all = {a: dict(m) for a, m in (stored or {}).items()}
        self._scales: dict[tuple[str, str], float] = {}
        self.trained: set[str] = set()

    def set(self, by: str, address: str, keep: Tensor, scale: float = 1.0) -> None:
        """Lay one method's mask; what it keeps is multiplied by `scale`."""
        self._all.setdefault(address, {})[by] = keep
        self._scales.pop((by, address), None)
        if scale != 1.0:
            self._scales[by, address] = scale

    def drop(self, by: str) -> list[str]:
        """Take all masks of a method off; returns their addresses."""
        found = [a for a, masks in self._all.items() if masks.pop(by, None) is not None]
        for a in found:
            self._scales.pop((by, a), None)
        return found

    def lift(self, address: str) -> Tensor | None:
        """Take the masks of all methods off a tensor; returns what they kept together."""
        keep = self.together(address)
        for by in self._all.pop(address, {}):
            self._scales.pop((by, address), None)
        return keep

    def addresses(self, by: str | None = None) -> list[str]:
        """Tensors that some method (or this one) masked."""
        return [a for a, masks in self._all.items() if by is None or by in masks]

    def of(self, by: str, address: str) -> Tensor | None:
        """One method's mask, or None."""
        return self._all.get(address, {}).get(by)

    def together(self, address: str) -> Tensor | None:
        """The intersection of all masks of a tensor, or None where nothing is masked."""
        masks = list(self._all.get(address, {}).values())
        return torch.stack(masks).all(0) if masks else None

    def overlay(self, address: str) -> Laid | None:
        """What the forward sees of a tensor; None if all of it, as it is."""
        keep = self.together(address)
        scale = 1.0
        for by in self._all.get(address, {}):
            scale *= self._scales.get((by, address), 1.0)
        if keep is None or (bool(keep.all()) and scale == 1.0):
            return None
        passes = self._all[address].keys() <= self.trained
        return partial(_straight_through if passes else _masked, keep, scale)

    def edits(self, by: str) -> list[Mask]:
        """Mask edits for what a method masked and no surgery has cut."""
        out = []
        for address, masks in self._all.items():
            if by in masks and not bool(masks[by].all()):
                share = 1.0 - float(masks[by].float().mean())
                out.append(Mask(by=by, at=address, key=f"{address}.mask", sparsity=share))
        return out

    def slice(
        self, edits: Sequence[Remove | Skip | Factorize | Replace | Decompose | Exit]
    ) -> None:
        """Follow a surgery: keep of every mask what was kept of its tensor."""
        for edit in edits:
            if isinstance(edit, (Skip, Factorize, Replace)):
                gone = edit.gone if isinstance(edit, Skip) else (edit.at,)
                self._all = {a: m for a, m in self._all.items() if not covers(gone, a)}
                continue
            for part in edit.group:
                masks = self._all.get(part.at, {})
                index = torch.tensor(part.keep)
                for by, m in masks.items():
                    masks[by] = m.index_select(part.dim, index.to(m.device))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All masks; `Masks(state)` is the inverse (scales last one mini-batch, no longer)."""
        return self._all


def _masked(keep: Tensor, scale: float, w: Tensor) -> Tensor:
    return w * (keep.to(w.dtype) if scale == 1.0 else keep.to(w.dtype) * scale)


def _straight_through(keep: Tensor, scale: float, w: Tensor) -> Tensor:
    return w + (_masked(keep, scale, w) - w).detach()
