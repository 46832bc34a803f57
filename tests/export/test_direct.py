"""The direct way to ONNX: each operator at several batch sizes, and what it leaves to torch."""

import numpy as np
import onnxruntime
import pytest
import torch
from small_nets import EMPTY
from torch import nn
from torch.nn import functional as F

from gracile.export import onnx as onnx_export
from gracile.export.direct import EMIT, to_proto
from gracile.export.onnx import OPSET, to_onnx
from gracile.export.plain import NotPlain
from gracile.export.prepare import prepare
from gracile.models.spec import resolve
from gracile.nn.binary import Step
from gracile.nn.shortcut import ChannelPad


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, f, *modules):
        super().__init__()
        self.f, self.parts = f, nn.ModuleList(modules)

    def forward(self, x):
        return self.f(x, *self.parts)


def scattered():
    pad = ChannelPad(4, front=1, back=2, stride=2)
    pad.source = [2, -1, 0, 3, -1]
    return pad


IMAGE = (4, 9, 8)
CASES = {  # operator -> [(module, shape of one sample)]
    "mark": [(nn.Conv2d(4, 3, 1), IMAGE)],
    "identity": [(Call(lambda x: x.contiguous().relu()), IMAGE)],
    "dropout": [(nn.Sequential(nn.Conv2d(4, 3, 1), nn.Dropout()), IMAGE)],
    "conv": [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), IMAGE),
        (nn.Conv2d(4, 4, (3, 1), padding=(1, 0), dilation=(2, 1)), IMAGE),
        (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2)), IMAGE),
        (nn.Conv1d(4, 6, 3, padding=2), (4, 9)),
        (nn.Conv3d(2, 3, 3), (2, 5, 5, 5)),
    ],
    "conv_transpose": [
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), IMAGE),
        (nn.ConvTranspose1d(4, 2, 4, stride=3), (4, 9)),
    ],
    "linear": [
        (nn.Sequential(nn.Linear(8, 5)), (8,)),
        (nn.Linear(8, 5), (8,)),
        (nn.Linear(8, 5, bias=False), (8,)),
        (nn.Linear(8, 5), (3, 8)),
        (nn.Linear(8, 5, bias=False), (3, 8)),
    ],
    "matmul": [(Call(lambda x: x @ x.transpose(1, 2)), (3, 5))],
    "embedding": [(nn.Sequential(nn.Embedding(7, 3)), (5,))],
    "batch_norm": [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), IMAGE),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, affine=False)), IMAGE),
    ],
    "relu": [(nn.ReLU(inplace=True), IMAGE), (Call(lambda x: F.relu(x)), IMAGE)],
    "relu6": [(nn.ReLU6(), IMAGE)],
    "hardtanh": [(nn.Hardtanh(), IMAGE), (nn.Hardtanh(-0.5, 2.0), IMAGE)],
    "clamp": [(Call(lambda x: x.clamp(min=0.25)), IMAGE), (Call(lambda x: x.clamp(-1, 1)), IMAGE)],
    "sigmoid": [(nn.Sigmoid(), IMAGE)],
    "tanh": [(nn.Tanh(), IMAGE)],
    "hardsigmoid": [(nn.Hardsigmoid(), IMAGE)],
    "hardswish": [(nn.Hardswish(), IMAGE)],
    "silu": [(nn.SiLU(), IMAGE)],
    "gelu": [(nn.GELU(), IMAGE), (nn.GELU("tanh"), IMAGE)],
    "leaky_relu": [(nn.LeakyReLU(0.2), IMAGE), (Call(lambda x: F.leaky_relu(x)), IMAGE)],
    "elu": [(nn.ELU(0.7), IMAGE)],
    "softmax": [(nn.Softmax(1), IMAGE)],
    "log_softmax": [(nn.LogSoftmax(-1), IMAGE)],
    "add": [(Call(lambda x: x + x.relu()), IMAGE), (Call(lambda x: 2 + x), IMAGE)],
    "sub": [(Call(lambda x: 1 - x), IMAGE), (Call(lambda x: x - 3.5), IMAGE)],
    "mul": [(Call(lambda x: x * x.mean((2, 3), keepdim=True)), IMAGE)],
    "div": [(Call(lambda x: x / 4), IMAGE), (Call(lambda x: 1 / (x.sigmoid() + 1)), IMAGE)],
    "max_pool": [
        (nn.MaxPool2d(3, 2, 1), IMAGE),
        (nn.MaxPool2d((2, 3)), IMAGE),
        (nn.MaxPool1d(2, dilation=2, stride=1), (4, 9)),
    ],
    "avg_pool": [
        (nn.AvgPool2d(2), IMAGE),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), IMAGE),
        (nn.AvgPool2d(3, 1, 1), IMAGE),
    ],
    "adaptive_avg_pool": [(nn.AdaptiveAvgPool2d(1), IMAGE), (nn.AdaptiveAvgPool2d((3, 4)), IMAGE)],
    "mean": [
        (Call(lambda x: x.mean((2, 3))), IMAGE),
        (Call(lambda x: x.mean(-1, keepdim=True)), IMAGE),
        (Call(lambda x: x.mean(1)), IMAGE),
    ],
    "flatten": [(nn.Flatten(), IMAGE), (Call(lambda x: x.flatten(2)), IMAGE)],
    "reshape": [
        (Call(lambda x: x.view(x.size(0), -1)), IMAGE),
        (Call(lambda x: x.reshape(-1, 2, 2, 9, 8)), IMAGE),
        (Call(lambda x: x.reshape(x.shape[0] * 4, 72).sigmoid().view(-1, 4, 9, 8)), IMAGE),
        (nn.Unflatten(1, (2, 2)), IMAGE),
    ],
    "squeeze": [(Call(lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)), IMAGE)],
    "unsqueeze": [(Call(lambda x: x.unsqueeze(1)), (5,))],
    "permute": [
        (Call(lambda x: x.permute(0, 2, 3, 1)), IMAGE),
        (Call(lambda x: x.transpose(-1, 1)), IMAGE),
    ],
    "cat": [(Call(lambda x: torch.cat([x, x.relu(), x], 1)), IMAGE)],
    "chunk": [(Call(lambda x: x.chunk(4, 2)[0] * x.chunk(4, 2)[1]), IMAGE)],
    "split": [
        (Call(lambda x: torch.add(*x.split(2, 1))), IMAGE),
        (Call(lambda x: x.split([1, 3], 1)[1]), IMAGE),
    ],
    "getitem": [
        (Call(lambda x: x[:, 1:, ::2, :-1] * 2), IMAGE),
        (Call(lambda x: x.chunk(2, 1)[1].relu()), IMAGE),
    ],
    "pad": [
        (nn.ZeroPad2d((1, 2, 0, 3)), IMAGE),
        (Call(lambda x: F.pad(x, (1, 1), value=2.5)), IMAGE),
    ],
    "channel_pad": [
        (nn.Sequential(ChannelPad(4, front=1, back=3, stride=2)), IMAGE),
        (nn.Sequential(ChannelPad(4, back=1)), IMAGE),
        (nn.Sequential(scattered()), IMAGE),
    ],
    "step": [
        (nn.Sequential(Step(torch.tensor(2.0), torch.zeros(4))), IMAGE),
        (nn.Sequential(Step(torch.tensor(2.0), torch.zeros(8), -1)), (3, 8)),
    ],
}
REFUSED = {
    "a batch written in": (Call(lambda x: x.reshape(2, 36, 8)), IMAGE),
    "another operator": (Call(lambda x: torch.cumsum(x, 1)), IMAGE),
    "same padding": (nn.Conv2d(4, 4, 3, padding="same"), IMAGE),
    "reflected": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), IMAGE),
    "reflection": (nn.ReflectionPad2d(1), IMAGE),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True), IMAGE),
    "alpha": (Call(lambda x: torch.add(x, x.relu(), alpha=2)), IMAGE),
    "floor": (Call(lambda x: torch.div(x, 2.0, rounding_mode="floor")), IMAGE),
    "another name": (Call(lambda x: torch.cat([x, x], axis=1)), IMAGE),
    "own statistics": (nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), IMAGE),
    "a mean of all": (Call(lambda x: x + x.mean()), IMAGE),
    "one pixel": (Call(lambda x: x[:, :, 0]), IMAGE),
    "adaptive": (nn.AdaptiveAvgPool2d(4), IMAGE),
    "always on": (Call(lambda x: F.dropout(x, 0.0, True)), IMAGE),
    "written into": (Call(lambda x: (y := x * 2, y.add_(1), y * y)[2]), IMAGE),
    "scaled rows": (nn.Sequential(nn.Embedding(7, 3, max_norm=1.0)), (5,)),
    "indices": (Call(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]), IMAGE),
}


def batch_of(module, n, shape):
    """Noise, or numbers of rows for a table."""
    if any(isinstance(m, nn.Embedding) for m in module.modules()):
        return torch.randint(7, (n, *shape))
    return torch.randn(n, *shape)


def direct(module, shape):
    module = module.eval()
    example = batch_of(module, 2, shape)
    prepared = prepare(module, EMPTY, {}, example)
    return to_proto(prepared, (example,), OPSET)


def test_every_operator_has_a_case():
    assert set(CASES) == set(EMIT)


@pytest.mark.parametrize(
    ("op", "k"), [(op, k) for op, cases in CASES.items() for k in range(len(cases))]
)
def test_the_file_computes_what_the_module_does_at_any_batch_size(op, k, monkeypatch):
    monkeypatch.setattr(onnx_export.torch.onnx, "export", None)  # nothing is left to torch
    module, shape = CASES[op][k]
    for p in module.state_dict().values():
        if p.is_floating_point():
            p.data.uniform_(0.2, 1.0)
    module.eval()
    _, proto = to_onnx(module, EMPTY, {}, batch_of(module, 2, shape))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for batch in (1, 2, 5):
        x = batch_of(module, batch, shape)
        with torch.no_grad():
            expected = module(x.clone()).numpy()
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_left_to_torchs_exporter(name):
    with pytest.raises(NotPlain):
        direct(*REFUSED[name])


@pytest.mark.parametrize("name", ["resnet20_cifar_a", "mobilenet_v2", "vgg11_cifar", "alexnet"])
def test_the_networks_of_the_zoo_need_no_other_exporter(name, monkeypatch):
    monkeypatch.setattr(onnx_export.torch.onnx, "export", None)
    size = 32 if "cifar" in name else 224
    to_onnx(resolve(name).model.eval(), EMPTY, {}, torch.randn(2, 3, size, size))
