"""Methods that put something else in the place of layers, one layer after another.

In turns with training: Gusak et al. 2019, arXiv:1903.09973, for factors.
"""

from abc import abstractmethod
from math import ceil
from typing import Any

from gracile.core import method as core
from gracile.errors import BindError
from gracile.graph.graph import Node
from gracile.lowrank.layers import layers, path_of, shared


class LayerByLayer(core.Method):
    """Base: chooses layers at bind, and changes equal parts of them at each firing, in order.

    Options have `weights` (a selector or None for all that can be changed) and `when`.

    Attributes:
        chosen: addresses of the weights of all layers it will change.
        done: how many of them are.
    """

    def on_attach(self, s: Any) -> None:
        self.done = 0
        wanted = self.options.weights
        selected = None if wanted is None else s.tensors(wanted)
        self.chosen: list[str] = []
        whys = {a: why for a, why in shared(s).items() if selected is None or a in selected}
        for address, node in layers(s).items():
            if selected is not None and address not in selected:
                continue
            why = self.unsupported(s, node)
            if why is None:
                self.chosen.append(address)
            else:
                whys[address] = why
        for address, why in whys.items():
            s.note(address, "structure", "kept", "unsupported", why, self.id)
        if not self.chosen:
            first = next((f"'{a}': {why}" for a, why in whys.items()), "it has no such layer")
            raise BindError(f"'{self.id}': no layer of {s.name} can be {self.doing}: {first}")

    def on_fire(self, s: Any, progress: float) -> None:
        wanted = ceil(progress * len(self.chosen) - 1e-9)
        for address in self.chosen[self.done : wanted]:
            if address in s.parameter_names:
                self.change(s, address, layers(s)[address])
        self.done = max(self.done, wanted)

    def claims(self, s: Any) -> list[tuple[str, str]]:
        return [("module", path_of(a)) for a in self.chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])

    @property
    @abstractmethod
    def doing(self) -> str:
        """What is done to layers: "factorized by 'svd'"."""

    @abstractmethod
    def unsupported(self, s: Any, node: Node) -> str | None:
        """Why a layer cannot be changed, now or ever; None if it can."""

    @abstractmethod
    def change(self, s: Any, address: str, node: Node) -> None:
        """Change one layer, or note in the ledger why not."""

    def kept(self, s: Any, address: str, why: str) -> None:
        """Note that a layer stays as it is, as changing it would gain nothing."""
        s.note(address, "structure", "kept", "no_gain", why, self.id)
