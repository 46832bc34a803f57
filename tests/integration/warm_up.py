"""Imports what a run needs, once: the process that runs are forked from has it already."""

import importlib

from gracile import registry

SLOW = (
    "gracile.cli.main",
    "gracile.train.run",
    "gracile.report.html",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "sklearn.datasets",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch.onnx._internal.exporter._core",
)

for _name in SLOW:
    importlib.import_module(_name)
for _kind in registry.HOMES:
    registry.load(_kind)
