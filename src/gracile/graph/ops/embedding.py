"""Embeddings: the columns of a table are channels, its rows are looked up by number."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Labels, Value
from gracile.graph.oprule import Kept, OpRule, Shape, oprule


class _Table(OpRule):
    roles = ("weight",)
    attributes = ("num_embeddings", "embedding_dim")

    def complete(self, attrs: dict[str, Any], params: Mapping[str, Shape]) -> None:
        """Sizes of a functional call."""
        if "weight" in params:
            attrs.setdefault("num_embeddings", params["weight"][0])
            attrs.setdefault("embedding_dim", params["weight"][1])

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The table writes channels along the last dim."""
        weight = node.params.get("weight")
        if weight is None or node.shape is None:
            return flow.give_up(node, values, f"the table of '{node.op}' is computed")
        for value in values:
            flow.protect_value(value, f"'{node.id}' looks up by it")
        flow.protect(flow.axis(weight, 0), f"'{node.id}' looks rows up by number")
        lead: tuple[Labels | None, ...] = (None,) * (len(node.shape) - 1)
        return Axes((*lead, flow.written(weight, 1)), "it lies in time")

    def resize(self, module: Any, kept: Kept) -> None:
        """Sizes from the table."""
        module.num_embeddings, module.embedding_dim = module.weight.shape


@oprule("embedding", source="torch.nn.functional.embedding: weight (rows, channels)")
class Embedding(_Table):
    """A row for each number."""

    modules = (nn.Embedding,)
    calls = {
        F.embedding: ("input", "weight"),
        torch.embedding: ("weight", "input"), "aten.embedding": ("weight", "input"),
    }  # fmt: skip


@oprule("embedding_bag", source="torch.nn.functional.embedding_bag")
class EmbeddingBag(_Table):
    """Rows summed, averaged or the largest of each channel."""

    modules = (nn.EmbeddingBag,)
    calls = {F.embedding_bag: ("input", "weight")}
