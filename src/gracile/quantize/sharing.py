"""What all ways of sharing weights have in common: the overlay, its training, edits and state."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gracile.core import method as core
from gracile.core.plan import Share
from gracile.core.schedule import END, Time, When
from gracile.distribute.collective import average_gradients
from gracile.errors import BindError
from gracile.quantize.codebook import Shared
from gracile.quantize.patterns import WEIGHT_OPS
from gracile.recipe.fields import Selector

LAYER = "share"  # the overlay layer of weights
TYPES = {"float32": torch.float32, "float16": torch.float16}


class SharingOptions(core.Options):
    """Options of `quantize: share` and `quantize: product`.

    Attributes:
        weights: which weights; default those of all convolution and linear layers.
        codebook: type of the codebook in a file; with float16 its entries are rounded to that at
            the end.
        train: whether the codebook is trained from the firing on. The codes stand still.
        codebook_lr: learning rate of the codebook; no schedule changes it.
        codebook_optimizer: of the codebook, without momentum and weight decay.
        when: one instant; default after training, and then nothing is trained. `{start: T}` is the
            same as `{at: T}`.
    """

    weights: Selector | None = None
    codebook: Literal["float32", "float16"] = "float32"
    train: bool = True
    codebook_lr: float = Field(default=1e-3, gt=0)
    codebook_optimizer: Literal["sgd", "adam"] = "adam"
    when: When = Field(default_factory=lambda: When(at=END))

    @model_validator(mode="after")
    def _once(self) -> Self:
        w = self.when
        if w.stop or w.every or not (w.once or w.start):
            raise ValueError(
                "weights are shared once, and for good; write when: {at: end}, or {start: 2ep} to "
                "train the codebooks from then on"
            )
        return self

    @property
    def timing(self) -> When:
        """One firing."""
        at = self.when.start or self.when.at
        return When(at=at if at == END else Time.parse(at))


class Sharing(core.Method):
    """Base: a subclass says in `_share` what codebook and codes a weight gets.

    The codebooks have an optimizer of their own, which steps when the training's does: their
    gradients are sums over thousands of weights and want another learning rate, and no weight
    decay. The stored weight stands still and gets no gradient, unless `shared` passes it on.

    Attributes:
        shared: address -> its codebook and codes, from the firing on.
    """

    Options: ClassVar[type[core.Options]] = SharingOptions

    def on_attach(self, s: Any) -> None:
        if self._tunes() and not self.options.when.at_end:
            core.refuse_loss_scaling(self, s, "its codebooks, which have an optimizer of their own")
        self.session = s
        self.shared: dict[str, Shared] = {}
        self.addresses = self._addresses(s)
        self._make_optimizer()

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        return [("values", a) for a in self.addresses]

    def nonzero(self, s: Any) -> Iterable[str]:
        return () if self._keeps_zeros() else self.addresses

    def on_fire(self, s: Any, progress: float) -> None:
        with torch.no_grad():
            self._share_all(s)
        for address, shared in self.shared.items():
            s.overlays.set(address, LAYER, shared)
            s.parameter(address).grad = None  # of an earlier step: a step would move what stands
        self._make_optimizer()
        s.changed = True

    def on_before_step(self, s: Any) -> None:
        if not self.shared or not self._tunes():
            return
        average_gradients(nn.ParameterList(x.values for x in self.shared.values()))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        for edit in edits:
            for part in getattr(edit, "group", ()):
                x = self.shared.get(part.at)
                if x is not None:
                    x.cut(part.dim, torch.tensor(part.keep, device=x.codes.device))
        self.addresses = [a for a in self.addresses if a in s.parameter_names]
        gone = self.shared.keys() - set(self.addresses)
        if gone:
            state = {a: self.optimizer.state.get(x.values) for a, x in self.shared.items()}
            self.shared = {a: x for a, x in self.shared.items() if a not in gone}
            self._make_optimizer()
            for a, x in self.shared.items():
                if state[a]:
                    self.optimizer.state[x.values] = state[a]

    def on_detach(self, s: Any) -> Iterable[Share]:
        for address, x in self.shared.items():
            keep = s.mask(address)
            if keep is not None and not x.zeros:
                self._refuse_masked(address)
            if keep is not None:
                x.hide(keep)
            x.drop_zero()
            x.round_(TYPES[self.options.codebook])
            x.settle(s.overlays.effective(address, upto="mask").detach())
            s.note(address, "precision", "shared", None, x.described(), self.id)
        return [
            Share(
                by=self.id, at=a, key=f"{a}.shared", levels=x.levels, block=x.block, bucket=x.bucket
            )
            for a, x in self.shared.items()
        ]

    def tensors(self) -> dict[str, Tensor]:
        """`<key>.codebook`, `<key>.codes` and what else `restore` needs, of every Edit."""
        dtype = TYPES[self.options.codebook]
        return {
            f"{a}.shared.{name}": value
            for a, x in self.shared.items()
            for name, value in x.tensors(dtype).items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "shared": {a: x.state() for a, x in self.shared.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        s = self.session
        for a, stored in state["shared"].items():
            self.shared[a] = self._again(
                {k: v.to(s.device) if isinstance(v, Tensor) else v for k, v in stored.items()}
            )
            s.overlays.set(a, LAYER, self.shared[a])
        self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    # --- what a subclass says

    def _share(self, s: Any, address: str, weight: Tensor) -> Shared | str:
        """Codebook and codes for a weight as the overlays below leave it, or why it gets none."""
        raise TypeError(f"{type(self).__name__} does not say how weights are shared")

    def _again(self, state: dict[str, Any]) -> Shared:
        """What `Shared.state` was of."""
        return Shared(**state)

    def _keeps_zeros(self) -> bool:
        """Whether a weight that is masked stays zero."""
        return bool(getattr(self.options, "keep_zeros", False))

    def _tunes(self) -> bool:
        """Whether codebooks are trained."""
        return bool(self.options.train)

    def _share_all(self, s: Any) -> None:
        """Fill `shared`; layer by layer, in order."""
        for address in self.addresses:
            self._take(s, address)

    # --- inside

    def _take(self, s: Any, address: str) -> None:
        weight = s.overlays.effective(address, upto="mask").detach()
        found = self._share(s, address, weight)
        if isinstance(found, Shared):
            self.shared[address] = found
        else:
            s.note(address, "precision", "float", "no_gain", found, self.id)

    def _addresses(self, s: Any) -> list[str]:
        if self.options.weights is not None:
            found: list[str] = s.tensors(self.options.weights)
            return found
        every = dict(s.model.named_parameters(remove_duplicate=False))  # tied names as well
        read = {id(every[a]) for n in s.graph.of_op(*WEIGHT_OPS) if (a := n.params.get("weight"))}
        return [a for a, p in s.model.named_parameters() if id(p) in read]

    def _refuse_masked(self, address: str) -> None:
        raise BindError(
            f"'{self.id}': '{address}' is masked, and these codebooks have no zero. Use quantize: "
            "share with keep_zeros: true, or cut the channels (prune: thin) first."
        )

    def _make_optimizer(self) -> None:
        cls = torch.optim.Adam if self.options.codebook_optimizer == "adam" else torch.optim.SGD
        values = [x.values for x in self.shared.values()] or [nn.Parameter(torch.zeros(0))]
        self.optimizer = cls(values, lr=self.options.codebook_lr)


def no_gain(weight: Tensor, *, codes: int, levels: int, entries: int) -> str | None:
    """Why codes and codebook would not be smaller than the weight in float32; None if they are.

    Args:
        weight: to share.
        codes: number of codes.
        levels: entries that a code chooses from.
        entries: numbers in the codebook.
    """
    bits = codes * math.ceil(math.log2(levels)) + 32 * entries
    if bits < 32 * weight.numel():
        return None
    return f"codes and codebook would take {bits // 8} bytes, the weight {4 * weight.numel()}"
