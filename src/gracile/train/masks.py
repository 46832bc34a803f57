"""Keep-masks on parameters: one per method and tensor, and a tensor keeps where all of them do."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gracile.core.plan import Mask, Remove, Skip
from gracile.graph.depth import covers


class Masks:
    """address -> method id -> keep-mask (bool, shape of the parameter)."""

    def __init__(self, stored: dict[str, dict[str, Tensor]] | None = None):
        self._all = {a: dict(m) for a, m in (stored or {}).items()}

    def set(self, by: str, address: str, keep: Tensor) -> None:
        """Lay one method's mask."""
        self._all.setdefault(address, {})[by] = keep

    def addresses(self) -> Iterable[str]:
        """Tensors that some method masked."""
        return list(self._all)

    def of(self, by: str, address: str) -> Tensor | None:
        """One method's mask, or None."""
        return self._all.get(address, {}).get(by)

    def together(self, address: str) -> Tensor | None:
        """The intersection of all masks of a tensor, or None where nothing is masked."""
        masks = list(self._all.get(address, {}).values())
        return torch.stack(masks).all(0) if masks else None

    def edits(self, by: str) -> list[Mask]:
        """Mask edits for what a method masked and no surgery has cut."""
        out = []
        for address, masks in self._all.items():
            if by in masks and not bool(masks[by].all()):
                share = 1.0 - float(masks[by].float().mean())
                out.append(Mask(by=by, at=address, key=f"{address}.mask", sparsity=share))
        return out

    def slice(self, edits: Sequence[Remove | Skip]) -> None:
        """Follow a surgery: keep of every mask what was kept of its tensor."""
        for edit in edits:
            if isinstance(edit, Skip):
                self._all = {a: m for a, m in self._all.items() if not covers(edit.gone, a)}
                continue
            for part in edit.group:
                masks = self._all.get(part.at, {})
                index = torch.tensor(part.keep)
                for by, m in masks.items():
                    masks[by] = m.index_select(part.dim, index.to(m.device))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All masks; `Masks(state)` is the inverse."""
        return self._all
