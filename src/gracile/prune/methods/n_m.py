"""N:M sparsity: of every M weights in a row N stay, the pattern that sparse tensor cores run.

In a row means along dim 1 of a weight, its inputs: `in_features` of a linear layer, the channels at
each kernel position of a convolution.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.errors import BindError
from gracile.prune.masking import Masking, MaskOptions
from gracile.prune.selection import lowest, removed_count
from gracile.recipe.fields import Amount, LevelValue
from gracile.recipe.messages import FieldError


class NMOptions(MaskOptions):
    """Options of `prune: n_m`.

    Attributes:
        n: how many weights of a run stay.
        m: how many weights make a run; must divide the inputs of every selected weight.
        share: the share of the runs that is pruned, those first that lose least; in (0, 1] or
            `{ramp, initial, final}`.
        sr_ste: decay of the weights under the mask, added to their gradient; with masked: trained.
            The paper takes 2e-4.
    """

    n: int = Field(default=2, ge=1)
    m: int = Field(default=4, ge=2)
    share: Amount = Field(default_factory=lambda: LevelValue(final=1.0))
    sr_ste: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.n >= self.m:
            raise FieldError(f"must be below m ({self.m}), got {self.n}. Write 2 of 4.", ("n",))
        if max(self.share.initial, self.share.final) > 1:
            raise FieldError(
                f"must be at most 1, got {max(self.share.initial, self.share.final):g}. "
                "Write a share of the runs.",
                ("share",),
            )
        if self.sr_ste and self.masked != "trained":
            raise FieldError(
                f"needs weights that go on learning under the mask, masked is {self.masked}. "
                "Write masked: trained.",
                ("sr_ste",),
            )
        return self


@core.method(
    "prune",
    "n_m",
    source="Mishra et al. 2021, arXiv:2104.08378; sr_ste: Zhou et al. 2021, arXiv:2102.04010",
)
class NM(Masking):
    """Keep the n largest of every m consecutive weights along the inputs.

    With masked: trained each firing chooses by the stored weights, so that a weight that grew comes
    back; otherwise by the masked ones, so that what is pruned stays pruned.
    """

    Options = NMOptions

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        for a in self.addresses:
            shape = tuple(s.parameter(a).shape)
            if len(shape) < 2 or shape[1] % self.options.m:
                inputs = f"{shape[1]} inputs" if len(shape) > 1 else "no inputs"
                raise BindError(
                    f"'{self.id}': '{a}' of shape {shape} has {inputs} along dim 1, which do not "
                    f"make whole runs of {self.options.m}; leave it out with '!{a}'."
                )

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        o = self.options
        level = o.share.at(progress)
        s.track(f"sparsity/{self.id}", level * (o.m - o.n) / o.m)
        return {a: n_of_m(self._scores(s, a), o.n, o.m, level) for a in self.addresses}

    def on_before_step(self, s: Any) -> None:
        if not self.options.sr_ste or s.over(self):
            return
        for a in s.masked_by(self.id):
            weight = s.parameter(a)
            if weight.grad is not None:
                weight.grad.add_(
                    weight.detach() * ~s.own_mask(self.id, a), alpha=self.options.sr_ste
                )

    def _scores(self, s: Any, address: str) -> Tensor:
        if self.options.masked == "trained":
            return s.parameter(address).detach().abs()  # type: ignore[no-any-return]
        weight = s.overlays.effective(address, upto="mask").detach()
        return torch.where(s.own_mask(self.id, address), weight.abs(), -1.0)  # these go first


def n_of_m(scores: Tensor, n: int, m: int, share: float = 1.0) -> Tensor:
    """Keep-mask with the n highest scores of each run of m along dim 1.

    Exactly n stay; of equal ones the first go.

    Args:
        scores: (O, I, ...), I a multiple of m.
        n, m: 0 < n < m.
        share: only floor(share * runs) are pruned, those that lose the lowest sum.

    Returns:
        bool, of that shape, on the CPU.

    >>> n_of_m(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2, 4)
    tensor([[ True, False,  True, False]])
    """
    rows = scores.movedim(1, -1).cpu()  # (O, I, ...) -> (O, ..., I)
    runs = rows.reshape(-1, m)
    gone = torch.argsort(runs, dim=1, stable=True)[:, : m - n]
    keep = torch.ones_like(runs, dtype=torch.bool).scatter_(1, gone, False)
    lost = runs.gather(1, gone).double().sum(1)
    pruned = lowest(lost, removed_count(share, len(runs), min_keep=0))
    out = torch.ones_like(keep)
    out[pruned] = keep[pruned]
    return out.reshape(rows.shape).movedim(-1, 1)
