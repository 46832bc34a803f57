"""Convolutions of one bit for OpenVINO: `BinaryConvolution` in the place of what computes the same.

The operator multiplies signs: of weights, and of activations that are -1 or 1. Ours are 0 or a
scale. With a = (1 + sign) / 2 a convolution of them is half of one of signs, and half the sum of
the weights; padding is -1 there, which is our 0. OpenVINO 2026.4's CPU plugin takes this only in
one form, found by trial: thresholds as a FakeQuantize of two levels onto {0, 1}, weights packed
from the lowest bit on, input channels in eights. So every kernel is tried before it is used.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from gracile.export.prepare import Prepared
from gracile.graph.instrument import INPUT, SUFFIX

EIGHT = 8  # input channels come in groups of so many
PLACES = 10  # images of so many places a side are tried

Array = NDArray[np.float32]


def with_kernels_of_one_bit(model: Any, prepared: Prepared) -> dict[str, str]:
    """Put them into a converted OpenVINO model, where they fit.

    Args:
        model: `openvino.Model`, changed.
        prepared: what it was converted from.

    Returns:
        Address of each binary weight that is left as it was -> why.
    """
    left = {}
    ports = {n: p for op in model.get_ordered_ops() for p in op.outputs() for n in p.get_names()}
    for node in prepared.graph.of_op("conv", "linear"):
        address = node.params.get("weight", "")
        grid = prepared.weights.get(address)
        if grid is None or grid.bits > 1:
            continue
        read = ports.get(f"{node.id}{INPUT}{SUFFIX}")
        if read is None:
            left[address] = "what it reads has more than one bit"
            continue
        step = np.float32(prepared.activations[node.id + INPUT].scale)
        height = grid.scale.float().expand(grid.q.shape[0]).numpy() * step
        left[address] = _replaced(read, grid.q.numpy().astype(np.float32), height)
    return {address: why for address, why in left.items() if why}


def _replaced(read: Any, signs: Array, height: Array) -> str:
    """Replace the convolution that reads a port; "" or why not."""
    conv = next((i.get_node() for i in read.get_target_inputs()), None)
    if conv is None or conv.get_type_name() != "Convolution" or signs.ndim != 4:
        return "OpenVINO has one bit for convolutions over two dims without groups only"
    if signs.shape[1] % EIGHT:
        return f"OpenVINO's kernel of one bit takes input channels in eights, not {signs.shape[1]}"
    step = read.get_node()
    while step.get_type_name() != "Greater":
        step = step.input_value(0).get_node()
    x, level = step.input_value(0), step.input_value(1).get_node().data.astype(np.float32)
    geometry = conv.get_attributes()
    try:
        right = _is_right(signs, level, geometry)
    except RuntimeError as e:
        return f"OpenVINO refuses the kernel of one bit: {str(e).strip().splitlines()[-1]}"
    if not right:
        return "OpenVINO's kernel of one bit computes something else on this machine"
    new = _one_bit(x, signs, level, geometry, height)
    names, friendly = conv.output(0).get_names(), conv.get_friendly_name()
    conv.output(0).replace(new.output(0))
    new.output(0).set_names(names)
    new.set_friendly_name(friendly)
    _name_for(new, friendly)
    return ""


def _name_for(new: Any, friendly: str) -> None:
    """Kernels are traced back to their unit by the names of operators."""
    inner = new.input_value(0).get_node().input_value(0).get_node()
    inner.set_friendly_name(f"{friendly}/OneBit")
    inner.input_value(0).get_node().set_friendly_name(f"{friendly}/Bits")


def _one_bit(x: Any, signs: Array, level: Array, geometry: Any, height: Array) -> Any:
    """height (per filter) times the convolution of {0, 1} with signs."""
    import openvino as ov
    from openvino import opset1

    zero, one = (np.float32(v) for v in (0, 1))
    bits = opset1.fake_quantize(x, level, level, zero, one, 2)
    packed = np.packbits((signs > 0).reshape(-1), bitorder="little")
    stored = ov.Tensor(packed, ov.Shape(signs.shape), ov.Type.u1)
    weight = ov.op.Constant(stored, shared_memory=False)
    where = [list(geometry[k]) for k in ("strides", "pads_begin", "pads_end", "dilations")]
    signed = opset1.binary_convolution(
        bits, weight, *where, "xnor-popcount", -1.0, geometry["auto_pad"]
    )
    alive = np.abs(signs).max((1, 2, 3))  # filters whose factor was 0 hold zeros, not signs
    half = (alive * height / 2).astype(np.float32).reshape(1, -1, 1, 1)
    total = np.where(signs > 0, 1, -1).sum((1, 2, 3)).astype(np.float32).reshape(1, -1, 1, 1)
    return opset1.add(opset1.multiply(signed, half), half * total)


def _is_right(signs: Array, level: Array, geometry: Any) -> bool:
    """Whether the processor at hand computes what is meant, on one noisy image."""
    import openvino as ov
    from openvino import opset1

    inputs = signs.shape[1]
    side = max(PLACES, *((k - 1) * d + 1 for k, d in zip(
        signs.shape[2:], geometry["dilations"], strict=True)))  # fmt: skip
    x = opset1.parameter([1, inputs, side, side], np.float32)
    ones = np.ones(len(signs), np.float32)
    made = ov.Model([_one_bit(x, signs, level, geometry, ones)], [x], "one_bit")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    noise = np.random.default_rng(0).standard_normal((1, inputs, side, side)).astype(np.float32)
    got = ov.Core().compile_model(made, "CPU", settings)([noise + level])[0]
    begin, end = geometry["pads_begin"], geometry["pads_end"]
    there = torch.from_numpy((noise + level > level).astype(np.float32))
    padded = F.pad(there, (begin[1], end[1], begin[0], end[0]))
    strides, dilations = tuple(geometry["strides"]), tuple(geometry["dilations"])
    want = F.conv2d(padded, torch.from_numpy(signs), None, strides, 0, dilations).numpy()
    return got.shape == want.shape and bool(np.abs(got - want).max() < 0.5)
