"""Depth pruning: leave the least important residual blocks out as a whole.

`y = x + f(x)` becomes `y = x`: fewer operators in a row, which makes a network faster where
narrower layers do not. Each skip is proven first: left out = multiplied by zero.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from gracile.core import method as core
from gracile.core.address import select
from gracile.core.schedule import When
from gracile.errors import BindError, VerificationError
from gracile.graph.depth import Block
from gracile.recipe.fields import KernelRef, Level, Selector, kernel


class DepthOptions(core.Options):
    """Options of `prune: depth`.

    Attributes:
        blocks: ids of the blocks that may go (`layer3.**`); default all. With neither `count` nor
            `ratio` all of these that can be left out go.
        count: how many go in the end.
        ratio: the share of them that goes, a number or `{ramp, initial, final}`.
        criterion: importance of a weight; a block's is the mean over the last weights of its
            branch. Smaller goes first.
        when: the firings; over several of them `count` is approached in equal steps.
    """

    blocks: Selector | None = None
    count: int | None = Field(default=None, ge=1)
    ratio: Level | None = None
    criterion: KernelRef("criterion") = Field(default_factory=lambda: kernel("criterion", "l1"))  # type: ignore[valid-type]
    when: When

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if self.count is not None and self.ratio is not None:
            raise ValueError("give either 'count' or 'ratio', not both")
        if self.count is None and self.ratio is None and self.blocks is None:
            raise ValueError("says not which blocks go: give 'count', 'ratio' or 'blocks'")
        return self


@core.method(
    "prune",
    "depth",
    source="after Huang et al. 2016, arXiv:1603.09382: networks work without some of their blocks",
)
class Depth(core.Method):
    """Leave the least important residual blocks out."""

    Options = DepthOptions
    needs = frozenset()
    rewires = True

    def on_attach(self, s: Any) -> None:
        self.failed: dict[str, str] = {}  # block -> why its skip was rolled back
        self.left_out: list[str] = []
        ids = [b.id for b in s.blocks]
        if ids and self.options.blocks is not None:
            ids = select(self.options.blocks, ids, {}, what="residual block", model=s.name)
        for b in s.blocks:
            if b.id in ids and b.protected is not None:
                s.note(b.id, "structure", "kept", "protected", b.protected, self.id)
        self.chosen = [b.id for b in s.blocks if b.id in ids and b.protected is None]
        if not self.chosen:
            whys = [f"'{b.id}': {b.protected}" for b in s.blocks if b.id in ids]
            raise BindError(
                f"'{self.id}': no residual block of {s.name} can be left out: "
                f"{'; '.join(whys[:3]) or s.graph.reason or 'it has none'}."
            )
        if (self.options.count or 0) > len(self.chosen):
            raise BindError(
                f"'{self.id}': count must be at most {len(self.chosen)}, the blocks that can be "
                f"left out, got {self.options.count}."
            )
        if not self._wanted(1.0):
            raise BindError(
                f"'{self.id}': ratio {self.options.ratio.final} of {len(self.chosen)} block(s) is "
                "less than one block; nothing would go. Give a larger ratio, or a count."
            )

    def on_fire(self, s: Any, progress: float) -> None:
        wanted = self._wanted(progress)
        while (missing := wanted - len(self.left_out)) > 0:
            ready = [b for b in s.blocks if b.id in self.chosen and b.protected is None]
            found = self._lowest(s, [b for b in ready if b.id not in self.failed], missing)
            if not found:
                break
            self._skip(s, found)
        if wanted and not self.left_out:
            raise VerificationError(
                f"'{self.id}': no block passes its proof, nothing was left out: "
                f"{next(iter(self.failed.values()), 'none can be left out any more')}"
            )
        if len(self.left_out) < wanted:
            s.warn(
                "target-missed",
                f"'{self.id}' left {len(self.left_out)} blocks out, {wanted} were asked for: the "
                "others lay inside these, cannot be left out now or failed their proof.",
            )
        s.track(f"blocks/{self.id}", len(self.left_out))

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        return [("module", id) for id in self.chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"failed": dict(self.failed), "left_out": list(self.left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.failed, self.left_out = dict(state["failed"]), list(state["left_out"])

    def _wanted(self, progress: float) -> int:
        n = len(self.chosen)
        if self.options.ratio is not None:
            return int(self.options.ratio.at(progress) * n + 1e-9)
        return int(progress * (self.options.count or n) + 1e-9)

    def _lowest(self, s: Any, ready: Sequence[Block], count: int) -> list[str]:
        """The least important blocks, none inside another of them; equal ones in their order."""
        out: list[str] = []
        inside: set[str] = set()
        for b in sorted(ready, key=lambda b: self._score(s, b)):
            if b.id not in inside and not inside.intersection(b.nodes) and len(out) < count:
                out.append(b.id)
                inside.update(b.nodes)
        return out

    def _score(self, s: Any, block: Block) -> float:
        with torch.no_grad():
            scores = [
                self.options.criterion.fn(s.overlays.effective(at, upto="mask").detach()).flatten()
                for at in block.last
            ]
        return float(torch.cat(scores).double().mean()) if scores else 0.0

    def _skip(self, s: Any, ids: Sequence[str]) -> None:
        """Leave these blocks out, or those of them that pass their proof."""
        try:
            s.skip(ids, by=self.id)
            self.left_out += ids
        except VerificationError as e:
            if len(ids) > 1:
                for id in ids:
                    self._skip(s, [id])
                return
            self.failed[ids[0]] = str(e)
            s.warn("cut-refused", f"'{self.id}': '{ids[0]}' is left as it was: {e}")
            s.note(ids[0], "structure", "kept", "protected", str(e), self.id)
