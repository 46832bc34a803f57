"""What a criterion wants to know beyond the weight, gathered between two firings.

    gradient          mean gradient of the loss over the optimizer steps since the last firing, of
                      the weight's shape
    squared_gradient  mean of its squares, the diagonal of the empirical Fisher matrix by batches
    activation_mean   (outputs,) mean of the activations of each output channel
    activation_zeros  (outputs,) share of them that is zero: APoZ
    norm_scale        (outputs,) scale of the BatchNorm that follows
    generator         of random numbers, another one for each tensor and firing

Gradients come from training; where no step was made since the last firing, from the calibration
batches, as do activations. An activation is the output of the nonlinearity that follows the layer,
looked for through BatchNorm and additions; of the layer itself where none follows.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gracile import registry
from gracile.distribute.collective import all_reduce_mean_
from gracile.errors import BindError
from gracile.graph.graph import Graph, Node
from gracile.recipe.fields import Kernel

KINDS = (
    "gradient", "squared_gradient", "activation_mean", "activation_zeros", "norm_scale",
    "generator",
)  # fmt: skip
FROM_GRADIENTS, FROM_ACTIVATIONS = KINDS[:2], KINDS[2:4]
NONLINEAR = (
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "selu", "gelu", "silu", "hardswish",
    "sigmoid", "hardsigmoid", "tanh", "softplus", "mish", "batch_norm_act",
)  # fmt: skip
PASSED = ("batch_norm", "add", "identity", "dropout")


class Evidence:
    """All that one method's criterion needs.

    Args:
        id: the method's.
        needs: kinds, in the order in which the criterion takes them.
        after: what is done with the sum of the scores of a group, see `criterion`.
    """

    def __init__(self, id: str, needs: Sequence[str] = (), after: str = "sum"):
        self.id, self.needs, self.after = id, tuple(needs), after
        self.steps = self.firings = 0
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._channels: dict[tuple[str, str], Tensor] = {}

    @classmethod
    def of_criterion(cls, id: str, criterion: Kernel) -> "Evidence":
        """What a registered criterion needs."""
        about = registry.get("criterion", criterion.name).meta
        return cls(id, about["needs"], about["after"])

    @property
    def wants_calibration(self) -> bool:
        """Whether activations are among the needs."""
        return any(k in FROM_ACTIVATIONS for k in self.needs)

    @property
    def method_needs(self) -> frozenset[str]:
        """The `needs` of a method that ranks by it."""
        return frozenset({"calibration"} if self.wants_calibration else ())

    def add_gradients(self, s: Any, addresses: Iterable[str]) -> None:
        """Take this step's gradients in; to be called when they are complete."""
        wanted = [k for k in self.needs if k in FROM_GRADIENTS]
        if not wanted:
            return
        self.steps += 1
        for address in addresses:
            grad = s.parameter(address).grad
            if grad is None:
                continue
            for kind in wanted:
                value = grad.detach() if kind == "gradient" else grad.detach() ** 2
                key = (kind, address)
                old = self._sums.get(key)
                self._sums[key] = value.clone() if old is None else old + value

    def gather(self, m: Any, s: Any, addresses: Sequence[str]) -> None:
        """Before ranking: look at what has not been seen yet.

        Raises:
            BindError: there is nothing to look at (see `Session.look`, `Session.gradients`).
        """
        if self.steps == 0 and any(k in FROM_GRADIENTS for k in self.needs):
            for _ in s.gradients(m):
                self.add_gradients(s, addresses)
            for total in self._sums.values():  # in training they are averaged before the step
                all_reduce_mean_(total)
        self._channels = {}
        if self.wants_calibration:
            self._look(m, s, addresses)
        if "norm_scale" in self.needs:
            for address in addresses:
                self._channels["norm_scale", address] = _norm_scale(self.id, s, address)

    def of(self, s: Any, address: str) -> tuple[Any, ...]:
        """The criterion's arguments after the weight.

        Raises:
            BindError: the loss does not depend on this tensor.
        """
        return tuple(self._one(s, kind, address) for kind in self.needs)

    def forget(self) -> None:
        """After a firing: gradients are counted anew."""
        self._sums, self.steps, self.firings = {}, 0, self.firings + 1

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs; `load_state_dict` is the inverse."""
        sums: dict[str, dict[str, Tensor]] = {}
        for (kind, address), value in self._sums.items():
            sums.setdefault(kind, {})[address] = value
        return {"steps": self.steps, "firings": self.firings, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.steps, self.firings = int(state["steps"]), int(state["firings"])
        self._sums = {(k, a): v for k, found in state["sums"].items() for a, v in found.items()}

    def _one(self, s: Any, kind: str, address: str) -> Any:
        if kind == "generator":
            return s.generator(self.id, address, self.firings)
        if kind in FROM_GRADIENTS:
            if (kind, address) not in self._sums:
                raise BindError(f"'{self.id}': '{address}' has no gradient to be ranked by.")
            return self._sums[kind, address] / max(1, self.steps)
        return self._channels[kind, address]

    def _look(self, m: Any, s: Any, addresses: Sequence[str]) -> None:
        layers = {a: _layer(self.id, s.graph, a) for a in addresses}
        nodes = {a: _activation(s.graph, layer) for a, layer in layers.items()}
        sums: dict[tuple[str, str], Tensor] = {}
        counts: dict[str, int] = {}
        for seen in s.look(m, {n.id for n in nodes.values()}):
            for a, node in nodes.items():
                x = (
                    seen[node.id]
                    .detach()
                    .movedim(-1 if layers[a].op == "linear" else 1, 0)
                    .flatten(1)
                    .double()
                )
                counts[a] = counts.get(a, 0) + x.shape[1]
                for kind, value in (("activation_mean", x), ("activation_zeros", x == 0)):
                    total = value.sum(1, dtype=torch.float64)
                    sums[kind, a] = sums[kind, a] + total if (kind, a) in sums else total
        for (kind, a), total in sums.items():
            self._channels[kind, a] = all_reduce_mean_((total / counts[a]).float())


def _layer(id: str, graph: Graph, address: str) -> Node:
    for node in graph:
        if node.params.get("weight") == address and node.op in ("conv", "conv_transpose", "linear"):
            return node
    raise BindError(
        f"'{id}': '{address}' is not the weight of a convolution or linear layer, so it has no "
        "activations or BatchNorm of its own to be ranked by. Narrow the selector."
    )


def _activation(graph: Graph, first: Node) -> Node:
    """The nonlinearity behind a layer, or the layer."""
    node = first
    while len(readers := graph.consumers(node.id)) == 1:
        node = readers[0]
        if node.op in NONLINEAR:
            return node
        if node.op not in PASSED or node.shape != first.shape:
            break
    return first


def _norm_scale(id: str, s: Any, address: str) -> Tensor:
    node = _layer(id, s.graph, address)
    for reader in s.graph.consumers(node.id):
        if reader.op in ("batch_norm", "batch_norm_act") and "weight" in reader.params:
            return s.parameter(reader.params["weight"]).detach()  # type: ignore[no-any-return]
    raise BindError(
        f"'{id}': no BatchNorm with a scale follows '{node.id}'. Narrow the selector, or take "
        "another criterion."
    )
