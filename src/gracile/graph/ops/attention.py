"""Attention: whole heads, and the width within each head, go by themselves."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from torch import nn
from torch.nn import functional as F

from gracile.graph.graph import Node
from gracile.graph.labels import Axes, Fixed, Flow, Labels, Several, Value
from gracile.graph.maps import ChannelMap
from gracile.graph.operands import Operand, argument, join, operands
from gracile.graph.oprule import OpRule, Shape, oprule
from gracile.graph.ops.elementwise import broadcast
from gracile.nn.attention import Attention
from gracile.nn.maps import ScaledDotProduct

SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
MHA = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask",
    "average_attn_weights", "is_causal",
)  # fmt: skip


class _Counts(OpRule):
    """A module whose channel counts are plain numbers."""

    counts: Sequence[str] = ()

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """A count."""
        return int(getattr(module, name)) if name in self.counts and dim == 0 else None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Set a count."""
        setattr(module, name, len(keep))


@oprule("scaled_dot_product_attention", source="Vaswani et al. 2017, arXiv:1706.03762, eq. 1")
class ScaledDotProductAttention(_Counts):
    """softmax(Q K' / sqrt(E)) V: queries and keys share E, keys and values the tokens.

    The scale 1 / sqrt(E) would follow a cut of E; the channel map keeps it.
    """

    modules = ("gracile.nn.maps.ScaledDotProduct",)
    attributes = ("width", "scale")
    calls = dict.fromkeys(
        (F.scaled_dot_product_attention, "aten.scaled_dot_product_attention"), SDPA
    )
    defaults = {"is_causal": False, "scale": None, "enable_gqa": False}
    counts = ("width",)

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Leading dims (batch, heads) as in a product; tokens that are attended to stay."""
        given = operands(node, values, flow, SDPA)
        q, k, v = (given.get(name) for name in SDPA[:3])
        if q is None or k is None or v is None or node.shape is None:
            return flow.give_up(node, values, f"'{node.op}' does not read three tensors")
        if any(o.axes is None or len(o.shape or ()) < 2 for o in (q, k, v)):
            return flow.give_up(node, values, f"'{node.op}' does not read three tensors")
        why = f"'{node.id}' normalizes over the tokens"
        for labels in (_dim(k, -2), _dim(v, -2)):
            flow.protect(labels, why)
        if argument(node, SDPA, "is_causal", node.attrs["is_causal"]) is not False:
            flow.protect(_dim(q, -2), f"'{node.id}' masks tokens by number")
        width = join(flow, _dim(q, -1), _dim(k, -1), f"'{node.id}' multiplies queries and keys")
        if width is not None:
            self._keep_scale(node, width, flow)
        lead = _leading(node, q, k, v, flow)
        if (mask := given.get("attn_mask")) is not None:
            lead = _masked(node, mask, lead, _dim(q, -2), flow)
        return Axes((*lead, _dim(q, -2), _dim(v, -1)), "attention makes it")

    def _keep_scale(self, node: Node, width: Labels, flow: Flow) -> None:
        """The map of a call with the default scale; a scale that is given as a number stays."""
        if node.module is not None:
            home = node.module
        else:
            scale = node.attrs["scale"]
            if isinstance(scale, (int, float)):
                return
            if scale is not None:
                flow.protect(width, f"the scale of '{node.id}' is computed")
                return
            home = flow.channel_map(node, _map_of(node, len(width)))
        axis = flow.map_axis(f"{home}.width", 0, len(width))
        flow.tie(axis, width, f"the width of '{node.id}'")

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Scores (L x S x E) and their product with the values (L x S x V), a head."""
        shapes = [s for s in inputs if s is not None]
        if node.shape is None or not shapes:
            return 0
        query, key = shapes[0], shapes[min(1, len(shapes) - 1)]
        return prod(node.shape[:-1]) * key[-2] * (query[-1] + node.shape[-1])


@oprule("multihead_attention", source="Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2")
class MultiheadAttention(_Counts):
    """torch's multi-head attention, projections and all.

    The width of the stream, whole heads, and the width of queries and keys or of values within each
    head are cut by themselves; `nn.attention.Attention` takes the module's place, which can have
    them.
    """

    modules = (nn.MultiheadAttention, "gracile.nn.attention.Attention")
    attributes = (
        "num_heads", "head_dim", "heads", "qk_width", "v_width", "batch_first", "add_zero_attn",
    )  # fmt: skip
    roles = (
        "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias",
        "bias_k", "bias_v", "out_proj.weight", "out_proj.bias",
    )  # fmt: skip
    counts = ("heads", "qk_width", "v_width")

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """The labels of three projections, each split into heads and widths."""
        given = operands(node, values, flow, MHA)
        inputs = [o for name in MHA[:3] if (o := given.get(name)) is not None]
        if len(inputs) != 3 or any(o.axes is None for o in inputs):
            return flow.give_up(node, values, "'multihead_attention' does not read three tensors")
        heads, qk, v = _widths(node.attrs)
        rows = _projections(node, inputs, (heads * qk, heads * qk, heads * v), flow)
        outer, width, values_ = _split_heads(node, rows, (heads, qk, v), flow)
        home = self._home(node, flow)
        for name, labels in (("heads", outer), ("qk_width", width), ("v_width", values_)):
            if labels is not None:
                axis = flow.map_axis(f"{home}.{name}", 0, len(labels))
                flow.tie(axis, labels, f"the heads of '{node.id}'")
        for name in ("key_padding_mask", "attn_mask"):
            if (mask := given.get(name)) is not None:
                flow.protect_value(mask.value, f"'{node.id}' masks with it")
                if len(mask.shape or ()) == 3:
                    flow.protect(outer, f"'{node.id}' is given a mask for each head")
        flow.tie(rows[2], flow.read(node.params["out_proj.weight"], 1), f"heads of '{node.id}'")
        out = flow.written(node.params["out_proj.weight"], 0)
        if "out_proj.bias" in node.params:
            flow.tie(out, flow.axis(node.params["out_proj.bias"], 0), f"outputs of '{node.id}'")
        query = inputs[0].axes
        assert query is not None
        made = Axes((*query.dims[:-1], out), query.why)
        return Several((made, self._weights(node, query, outer, flow)))

    def _home(self, node: Node, flow: Flow) -> str:
        """The path of the module whose counts are cut."""
        if "heads" in node.attrs:
            return str(node.module)
        call = node.fx
        source = call.graph.owning_module if call is not None else None
        if call is None or source is None or node.module is None:
            return flow.channel_map(node, None)
        module: Any = source.get_submodule(node.module)
        return flow.channel_map(
            node, ChannelMap(Attention(module), call.args, call.kwargs, at=node.module)
        )

    def _weights(self, node: Node, query: Axes, outer: Labels | None, flow: Flow) -> Value:
        """The attention map that is returned beside the output."""
        if argument(node, MHA, "need_weights", True) is False:
            return Fixed("no attention weights are returned")
        rank = len(query.dims)
        if argument(node, MHA, "average_attn_weights", True) is False:
            lead = (None,) * (rank - 2)
            return Axes((*lead, outer, None, None), "it lies between tokens")
        if _weights_are_read(node):
            flow.protect(outer, f"'{node.id}' averages over the heads, and that is read")
        return Axes((None,) * rank, "it lies between tokens")

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Four projections, scores and the product with the values."""
        shapes = [s for s in inputs if s is not None]
        if not shapes or "out_proj.weight" not in params:
            return 0
        heads, qk, v = _widths(node.attrs)
        lead, key = shapes[0], shapes[min(1, len(shapes) - 1)]
        first = bool(node.attrs.get("batch_first")) or len(lead) == 2
        length, keys = (s[-2] if first else s[0] for s in (lead, key))
        batch = prod(lead[:-1]) // length
        if "in_proj_weight" in params:
            columns = [params["in_proj_weight"][1]] * 3
        else:
            columns = [params[f"{n}_proj_weight"][1] for n in "qkv"]
        projected = heads * (
            length * qk * columns[0] + keys * (qk * columns[1] + v * columns[2])
        ) + length * prod(params["out_proj.weight"])
        return batch * (projected + heads * length * keys * (qk + v))


def _widths(attrs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, and the widths of queries and keys and of values."""
    if "heads" in attrs:
        return attrs["heads"], attrs["qk_width"], attrs["v_width"]
    return attrs["num_heads"], attrs["head_dim"], attrs["head_dim"]


def _projections(
    node: Node, inputs: Sequence[Operand], sizes: Sequence[int], flow: Flow
) -> list[Labels]:
    """Labels of what the three projections make; their inputs are tied to the columns."""
    why = f"the inputs of '{node.id}' stay"
    if "in_proj_weight" in node.params:
        packed = flow.written(node.params["in_proj_weight"], 0)
        rows = np.split(packed, np.cumsum(sizes)[:2].tolist())
        columns = [flow.read(node.params["in_proj_weight"], 1)] * 3
    else:
        addresses = [node.params[f"{n}_proj_weight"] for n in "qkv"]
        rows = [flow.written(a, 0) for a in addresses]
        columns = [flow.read(a, 1) for a in addresses]
    for operand, labels in zip(inputs, columns, strict=True):
        last = len(operand.shape or ()) - 1
        flow.only(operand.value, node, (last,))
        flow.tie(flow.along(operand.value, node, last, len(labels)), labels, why)
    if "in_proj_bias" in node.params:
        bias = flow.axis(node.params["in_proj_bias"], 0)
        flow.tie(bias, np.concatenate(rows), f"the heads of '{node.id}'")
    for role, labels in (("bias_k", rows[1]), ("bias_v", rows[2])):
        if role in node.params:
            flow.tie(flow.axis(node.params[role], 2), labels, f"the heads of '{node.id}'")
    return rows


def _split_heads(
    node: Node, rows: Sequence[Labels], counts: tuple[int, int, int], flow: Flow
) -> tuple[Labels | None, Labels | None, Labels | None]:
    """Labels of heads, of the queries' and keys' width and of the values'."""
    heads, qk, v = counts
    why = f"the heads of '{node.id}' are of one size"
    parts = [
        flow.split(labels, (heads, width), why)
        for labels, width in zip(rows, (qk, qk, v), strict=True)
    ]
    outer = join(flow, parts[0][0], parts[1][0], why)
    outer = join(flow, outer, parts[2][0], why)
    return outer, join(flow, parts[0][1], parts[1][1], why), parts[2][1]


def _weights_are_read(node: Node) -> bool:
    """Whether anything reads the second result of a call."""
    if node.fx is None:
        return True
    for user in node.fx.users:
        index = user.args[1] if len(user.args) > 1 else None
        if index != 0 and not (index == 1 and not user.users):
            return True
    return False


def _dim(operand: Operand, dim: int) -> Labels | None:
    axes = operand.axes
    return None if axes is None else axes.dims[dim]


def _leading(
    node: Node, q: Operand, k: Operand, v: Operand, flow: Flow
) -> tuple[Labels | None, ...]:
    """Batch dims and heads of the output."""
    shapes = [(o.shape or ())[:-2] for o in (q, k, v)]
    dims = [a.dims[:-2] for o in (q, k, v) if (a := o.axes) is not None]
    shape, heads = (node.shape or ())[:-2], None
    grouped = bool(shape) and 1 < shapes[1][-1] < shapes[0][-1]
    if grouped:  # each key head serves several query heads
        few, many = shapes[1][-1], shapes[0][-1]
        heads, why = dims[0][-1], f"'{node.id}' reads key heads that stay"
        outer, _ = flow.split(heads, (few, many // few), why)
        keys = join(flow, dims[1][-1], dims[2][-1], why)
        if join(flow, outer, keys, why) is None:
            flow.protect(heads, why)
        shapes, dims, shape = [s[:-1] for s in shapes], [d[:-1] for d in dims], shape[:-1]
    values = [Axes(d, "attention makes it") for d in dims]
    out = broadcast(node, values, shapes, shape, flow)
    lead = out.dims if isinstance(out, Axes) else ()
    return (*lead, heads) if grouped else lead


def _masked(
    node: Node,
    mask: Operand,
    lead: tuple[Labels | None, ...],
    queries: Labels | None,
    flow: Flow,
) -> tuple[Labels | None, ...]:
    """Tie a mask or bias (..., heads, L, S) to the heads and queries it is for."""
    if mask.axes is None or mask.shape is None or node.shape is None:
        flow.protect_value(mask.value, f"'{node.id}' masks with it")
        return lead
    flow.protect(mask.axes.dims[-1], f"'{node.id}' normalizes over the tokens")
    target, shape = Axes((*lead, queries), "attention makes it"), node.shape[:-1]
    values = (target, Axes(mask.axes.dims[:-1], mask.axes.why))
    out = broadcast(node, values, (shape, mask.shape[:-1]), shape, flow)
    return out.dims[:-1] if isinstance(out, Axes) else lead


def _map_of(node: Node, width: int) -> ChannelMap | None:
    call = node.fx
    if call is None:
        return None
    given = {**dict(zip(SDPA, call.args, strict=False)), **call.kwargs}
    args = tuple(given.pop(name) for name in SDPA[:3])
    given.pop("scale", None)
    return ChannelMap(ScaledDotProduct(width, width**-0.5), args, given)
