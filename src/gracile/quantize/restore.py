"""From a plain model and a Plan back to the model that computes what the integer kernels will."""

from collections.abc import Mapping

from torch import Tensor, nn

from gracile.core.plan import Bits, Plan
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.graph.graph import Node
from gracile.graph.instrument import instrument
from gracile.nn.binary import Binarizer
from gracile.nn.quantized import ActivationQuantizer
from gracile.quantize.binary import CHANNELS


def simulate(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
) -> nn.Module:
    """Rebuild the quantized model of a checkpoint.

    Args:
        model: the network after all surgery, with the checkpoint's weights: those on a grid hold
            their dequantized values, so nothing is left to do for them.
        plan: its Bits edits of role input and output name the nodes to quantize behind, or before
            where only that node reads the grid: one bit, or a range found at run time.
        tensors: `<key>.scale` and `<key>.zero_point` of every Bits edit with a grid of its own,
            `<key>.threshold` of those of what an operator reads.
        example: an input batch, to capture the graph with.

    Returns:
        The captured graph with an ActivationQuantizer in mode "quantize" behind each such node; it
        shares the model's parameters. The model itself if no activation is quantized.

    Raises:
        UserError: a scale is missing, or a node of the plan is not in this model.
    """
    edits = [e for e in plan.of_kind("bits") if e.role in ("input", "output")]
    if not edits:
        return model
    graph = capture(model, example)
    after: dict[str, nn.Module] = {}
    before: dict[str, nn.Module] = {}
    for edit in edits:
        if edit.at not in graph.nodes:
            raise UserError(
                f"plan edit {edit.id} quantizes the {edit.role} of '{edit.at}', and this model has "
                "no such operator; the plan belongs to another network."
            )
        read = edit.role == "input" and graph[edit.at].op != "input"
        q = (
            _binarizer(graph[edit.at], edit, tensors)
            if read and not edit.dynamic
            else ActivationQuantizer(
                edit.bits,
                signed=edit.signed,
                symmetric=edit.symmetric,
                narrow=edit.narrow,
                dynamic=edit.dynamic,
            )
        )
        for name in () if edit.dynamic else ("scale", "zero_point"):
            if f"{edit.key}.{name}" not in tensors:
                raise UserError(f"the checkpoint lacks '{edit.key}.{name}' of plan edit {edit.id}.")
            getattr(q, name).copy_(tensors[f"{edit.key}.{name}"].reshape(()))
        q.mode = "quantize"
        (before if read else after)[edit.at] = q.train(model.training)
    return instrument(graph, after, before)


def _binarizer(node: Node, edit: Bits, tensors: Mapping[str, Tensor]) -> Binarizer:
    key = f"{edit.key}.threshold"
    if key not in tensors:
        raise UserError(f"the checkpoint lacks '{key}' of plan edit {edit.id}.")
    channels = node.attrs.get("in_channels", node.attrs.get("in_features"))
    if channels is not None and int(channels) != tensors[key].numel():
        raise UserError(
            f"plan edit {edit.id} has thresholds for {tensors[key].numel()} channels, and "
            f"'{edit.at}' reads {channels}: what was cut before cannot come back under it."
        )
    q = Binarizer(tensors[key].numel(), CHANNELS[node.op])
    q.threshold.copy_(tensors[key])
    return q
