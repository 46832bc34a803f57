"""Small networks for export tests, and quantizers laid on them by hand."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gracile import registry
from gracile.benchmark.artifact import content_sha
from gracile.benchmark.param import read
from gracile.benchmark.processor import sums_saturate
from gracile.core.plan import Architecture, Bits, Plan
from gracile.graph.capture import capture
from gracile.graph.instrument import instrument
from gracile.nn.quantized import ActivationQuantizer

MOVES = ("output", "param", "getitem", "flatten", "channel_pad", "identity", "dropout", "quantize",
         "max_pool", "reshape", "permute")  # fmt: skip
FUSED = ("batch_norm", "relu", "relu6")
EMPTY = Plan(architecture=Architecture(name="test"))
# Weights of which sums of two products fit 16 bits, where the processor adds them so.
WEIGHT_BITS = 7 if sums_saturate() else 8


class Block(nn.Module):
    """A residual block; a change of width uses the parameter-free shortcut (option A)."""

    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.into, self.out, self.stride = into, out, stride

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            pad = (self.out - self.into) // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, pad, pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet-(6n + 2) as for CIFAR, narrow."""

    def __init__(self, n: int = 1, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, into = [], width
        for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for k in range(n):
                blocks.append(Block(into, out, stride if k == 0 else 1))
                into = out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(into, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.pool(self.blocks(x)), 1))


def as_if_trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorms with statistics and with factors of both signs; eval mode."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3, generator=g)
            m.running_var.uniform_(0.5, 1.5, generator=g)
            sign = torch.where(torch.rand(m.weight.shape, generator=g) < 0.3, -1.0, 1.0)
            m.weight.data.uniform_(0.5, 1.5, generator=g).mul_(sign)
            m.bias.data.normal_(0, 0.3, generator=g)
    return model.eval()


class Range:
    """The observer of these tests: smallest and largest value, 0 always inside."""

    def __init__(self):
        self.low = self.high = 0.0

    def observe(self, x):
        """Widen the range."""
        self.low = min(self.low, float(x.min()))
        self.high = max(self.high, float(x.max()))


def quantized(model, example, *, at=None, bits=8, weight_bits=WEIGHT_BITS, per_channel=True,
              signed=False, outputs=False):  # fmt: skip
    """(instrumented model, plan, tensors): int8 weights, quantizers behind every fused operator."""
    model = copy.deepcopy(model).eval()
    graph = capture(model, example)
    if at is None:
        at = [n.id for n in graph if _wants_quantizer(graph, n, outputs)]
    quantizers = {id: ActivationQuantizer(bits, signed=signed) for id in at}
    module = instrument(graph, quantizers).eval()
    for q in quantizers.values():
        q.mode, q.observer = "observe", Range()
    with torch.no_grad():
        module(*((example,) if isinstance(example, torch.Tensor) else example))
    for q in quantizers.values():
        seen, q.observer, q.mode = q.observer, None, "quantize"
        q.scale.fill_(max((seen.high - seen.low) / (q.qmax - q.qmin), 1e-8))
        q.zero_point.fill_(round(q.qmin - seen.low / float(q.scale)))
    edits, tensors = weights_on_grid(module, graph, weight_bits, per_channel)
    edits += [
        Bits(at=id, role="output", bits=bits, signed=signed, symmetric=False, key=f"{id}.output")
        for id in at
    ]
    return module, EMPTY.extended(edits), tensors


def weights_on_grid(module, graph, bits=8, per_channel=True):
    """Round the weights of all layers, in place; the edits and their tensors."""
    edits, tensors = [], {}
    for node in graph.of_op("conv", "conv_transpose", "linear"):
        address = node.params["weight"]
        axis = (1 if node.op == "conv_transpose" else 0) if per_channel else None
        weight = module.get_parameter(address)
        edit = Bits(at=address, role="weight", bits=bits, signed=True, symmetric=True, axis=axis,
                    narrow=True, key=f"{address}.weight")  # fmt: skip
        if any(e.at == address for e in edits):
            continue
        others = [d for d in range(weight.ndim) if d != axis]
        scale = weight.detach().abs().amax(others).clamp(min=1e-8) / edit.qmax
        shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
        wide = scale if axis is None else scale.reshape(shape)
        with torch.no_grad():
            weight.copy_(torch.round(weight / wide).clamp(edit.qmin, edit.qmax) * wide)
        tensors[f"{edit.key}.scale"] = scale
        tensors[f"{edit.key}.zero_point"] = torch.zeros_like(scale, dtype=torch.int32)
        edits.append(edit)
    return edits, tensors


def export(runtime, model, plan, tensors, example, path):
    """Export with the registered exporter."""
    exporter = registry.get("exporter", runtime).obj
    return exporter(model, plan, tensors, example=example, path=path, metadata={"seed": "0"})


def load(artifact, **options):
    """Load with the registered runtime."""
    return registry.get("runtime", artifact.runtime).obj(artifact, **options)


def with_fault(artifact, layer: str, filter: int, folder: Path):
    """A copy of the artifact in which one filter of one layer has the wrong sign."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / artifact.path.name
    if path.suffix == ".param":
        unit = next(u.id for u in artifact.units if layer in u.layers)
        _fault_in_param(artifact.path, path, unit, filter)
    else:
        fault = _fault_in_onnx if path.suffix == ".onnx" else _fault_in_ir
        fault(artifact.path, path, f"{layer}.weight", filter)
    return replace(artifact, path=path, sha=content_sha(path))


def _fault_in_onnx(source: Path, target: Path, name: str, filter: int) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values[filter] = -values[filter]
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, target)


def _fault_in_ir(source: Path, target: Path, name: str, filter: int) -> None:
    layers = ElementTree.parse(source).findall("layers/layer")
    data = next(x for x in layers if x.get("name") == name).find("data")
    shape = json.loads(f"[{data.get('shape')}]")
    kind = {"f32": np.float32, "i8": np.int8}[data.get("element_type")]
    content = bytearray(source.with_suffix(".bin").read_bytes())
    start, size = int(data.get("offset")), int(data.get("size"))
    values = np.frombuffer(content[start : start + size], kind).reshape(shape).copy()
    values[filter] = -values[filter]
    content[start : start + size] = values.tobytes()
    target.write_bytes(source.read_bytes())
    target.with_suffix(".bin").write_bytes(content)


def _fault_in_param(source: Path, target: Path, unit: str, filter: int) -> None:
    content, at = bytearray(source.with_suffix(".bin").read_bytes()), 0
    for x in read(source.read_text())[0]:
        p = x.params
        if x.type in ("Convolution", "InnerProduct"):
            bias, count = (p[5], p[6]) if x.type == "Convolution" else (p[1], p[2])
            kind = np.int8 if x.in_integers else np.float32
            size = count * np.dtype(kind).itemsize
            if x.name.startswith(f"{unit}@"):
                values = np.frombuffer(content[at + 4 : at + 4 + size], kind).reshape(p[0], -1)
                values[filter] = -values[filter]
                content[at + 4 : at + 4 + size] = values.tobytes()
            at += 4 + size + -size % 4 + 4 * p[0] * bias
            at += 4 * (p[0] + 1 + (p[8] > 100)) if x.in_integers else 0
        elif x.type == "Quantize":
            at += 4
    assert at == len(content)
    target.write_text(source.read_text())
    target.with_suffix(".bin").write_bytes(content)


def _wants_quantizer(graph, node, outputs) -> bool:
    readers = graph.consumers(node.id)
    if node.op in MOVES or node.shape is None:
        return False
    if node.op in ("conv", "conv_transpose", "linear", "batch_norm", "add") and (
        len(readers) == 1 and readers[0].op in FUSED
    ):
        return False
    return outputs or not all(r.op == "output" for r in readers)
