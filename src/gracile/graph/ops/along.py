"""Operators that work along a dim (cumsum, sort, argmax, norms) or sum over it in another way."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Flow, Several, Value
from gracile.graph.oprule import OpRule, oprule
from gracile.graph.ops.elementwise import Broadcast, broadcast
from gracile.graph.ops.maths import keys


class Along(OpRule):
    """Every index of a dim depends on the others: channels along it stay, others pass.

    Attributes:
        reduces: the dim vanishes, unless `keepdim`.
    """

    reduces: ClassVar[bool] = False

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Protect the dims it works along; a call without a dim works along all."""
        value, dim = values[0], node.attrs.get("dim")
        if not isinstance(value, Axes) or len(values) != 1:
            return flow.give_up(node, values, f"'{node.op}' does not read one tensor")
        rank = len(value.dims)
        dims = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
        if not all(isinstance(d, int) for d in dims):
            return flow.give_up(node, values, f"'{node.op}' has a dim that cannot be read")
        gone = {d % rank for d in dims} if rank else set()
        if not self.passes(node, len(gone)):
            for d in gone:
                flow.protect(value.dims[d], f"'{node.op}' works along the channels ('{node.id}')")
        if self.reduces and node.attrs.get("keepdim") is not True:
            left = tuple(v for d, v in enumerate(value.dims) if d not in gone)
        else:
            left = tuple(None if d in gone else v for d, v in enumerate(value.dims))
        out = Axes(left, value.why)
        return out if node.shape is not None else Several((out, out))  # values and indices

    def passes(self, node: Node, dims: int) -> bool:
        """Whether a channel of zeros adds nothing, so that it may go."""
        return False


def _add(name: str, names: Sequence[str], reduces: bool, defaults: Mapping[str, Any]) -> None:
    cls = type(
        name.title(),
        (Along,),
        {
            "calls": dict.fromkeys(keys(name), names),
            "defaults": defaults,
            "reduces": reduces,
            "__doc__": f"`{name}` along a dim.",
            "__module__": __name__,
        },
    )
    oprule(name, source=f"torch.{name}")(cls)


for _name in ("cumsum", "cumprod", "logcumsumexp"):
    _add(_name, ("input", "dim", "dtype"), False, {})
for _name in ("cummax", "cummin"):
    _add(_name, ("input", "dim"), False, {})
_add("sort", ("input", "dim", "descending"), False, {"dim": -1})
_add("argsort", ("input", "dim", "descending"), False, {"dim": -1})
_add("topk", ("input", "k", "dim", "largest", "sorted"), False, {"dim": -1})
for _name in ("argmax", "argmin", "any", "all", "prod"):
    _add(_name, ("input", "dim", "keepdim"), True, {"dim": None, "keepdim": False})
_add("logsumexp", ("input", "dim", "keepdim"), True, {"keepdim": False})
_add("median", ("input", "dim", "keepdim"), True, {"dim": None, "keepdim": False})
for _name in ("tril", "triu"):
    _add(_name, ("input", "diagonal"), False, {"dim": (-2, -1)})


class _Extreme(Along):
    """Of one tensor along a dim, or the larger or smaller of two."""

    reduces = True
    defaults = {"dim": None, "keepdim": False}

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Two tensors are tied."""
        if len(values) == 2:
            return Broadcast().flow(node, values, flow)
        return super().flow(node, values, flow)


@oprule("max", source="torch.max")
class Max(_Extreme):
    """Largest of one or of two tensors."""

    calls = dict.fromkeys((torch.max, ".max", "aten.max"), ("input", "dim", "keepdim"))


@oprule("min", source="torch.min")
class Min(_Extreme):
    """Smallest of one or of two tensors."""

    calls = dict.fromkeys((torch.min, ".min", "aten.min"), ("input", "dim", "keepdim"))


@oprule("part", source="torch.return_types: `.values`, `.indices`")
class Part(OpRule):
    """One of two results, by its name."""

    calls = dict.fromkeys((".values", ".indices"), ("input", "name"))

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The first or the second."""
        value, name = values[0], node.attrs.get("name")
        if not isinstance(value, Several) or name not in ("values", "indices"):
            return flow.give_up(node, values, "a part of something that is not known")
        return value.values[("values", "indices").index(name)]


@oprule("norm", source="torch.linalg.vector_norm")
class Norm(Along):
    """Length of vectors: a channel of zeros adds nothing to it."""

    reduces = statistic = True
    defaults = {"p": None, "dim": None, "keepdim": False}
    calls = {
        **dict.fromkeys((torch.norm, ".norm", "aten.norm"), ("input", "p", "dim", "keepdim")),
        torch.linalg.norm: ("input", "ord", "dim", "keepdim"),
        torch.linalg.vector_norm: ("input", "ord", "dim", "keepdim"),
        "aten.linalg_vector_norm": ("input", "ord", "dim", "keepdim"),
        "aten.linalg_norm": ("input", "ord", "dim", "keepdim"),
    }

    def passes(self, node: Node, dims: int) -> bool:
        """Not so for negative powers and norms of matrices."""
        p = node.attrs.get("ord", node.attrs["p"])
        return p in (None, "fro") or (isinstance(p, (int, float)) and p > 0 and dims == 1)


@oprule("cosine_similarity", source="torch.nn.functional.cosine_similarity")
class CosineSimilarity(OpRule):
    """Product of two normalized vectors: their channels are tied, and a zero adds nothing."""

    modules = (nn.CosineSimilarity,)
    statistic = True
    attributes = ("dim", "eps")
    defaults = {"dim": 1}
    calls = dict.fromkeys(
        (F.cosine_similarity, "aten.cosine_similarity"), ("x1", "x2", "dim", "eps")
    )

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """As a product, less the dim that is summed."""
        shapes, dim = [flow.shape_of(i) for i in node.inputs], node.attrs.get("dim")
        if len(values) != 2 or any(s is None for s in shapes) or not isinstance(dim, int):
            return flow.give_up(node, values, "'cosine_similarity' does not read two tensors")
        pair = [s or () for s in shapes]
        shape = tuple(torch.broadcast_shapes(*pair))
        both = broadcast(node, values, pair, shape, flow)
        if not isinstance(both, Axes):
            return both
        dim %= len(shape)
        return Axes(both.dims[:dim] + both.dims[dim + 1 :], both.why)
