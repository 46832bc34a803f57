"""The parameter-free shortcut: what it computes before and after its map was cut."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from gracile.nn.shortcut import ChannelPad

X = torch.randn(2, 3, 5, 5)


def test_pads_channels_and_strides_over_pixels():
    got = ChannelPad(3, 1, 2, stride=2)(X)
    assert got.shape == (2, 6, 3, 3)
    assert torch.equal(got, F.pad(X[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)))


def test_after_a_cut_in_the_middle_it_still_copies_the_right_channels():
    pad = ChannelPad(3, 1, 1)
    pad.cut(0, [0, 1, 3])  # zero, channel 0, channel 2
    pad.cut(1, [0, 2])
    assert pad.source == [-1, 0, 1]
    assert (pad.front, pad.back, pad.contiguous) == (1, 0, True)
    assert torch.equal(pad(X[:, [0, 2]])[:, 1:], X[:, [0, 2]])


def test_zeros_between_copied_channels():
    pad = ChannelPad(2, 1, 1)
    pad.source = [0, -1, 1]
    assert not pad.contiguous
    got = pad(X[:, :2])
    assert torch.equal(got[:, [0, 2]], X[:, :2])
    assert not got[:, 1].any()


@pytest.mark.parametrize("source", [[-1, 0, 1, -1], [0, -1, 1, -1]])
def test_exports_to_onnx(source, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pad = ChannelPad(2, 1, 1, stride=2).eval()
    pad.source = source
    path = tmp_path / "pad.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        torch.onnx.export(pad, (X[:, :2],), str(path), dynamo=True, verbose=False)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X[:, :2].numpy()})
    assert torch.equal(torch.from_numpy(got), pad(X[:, :2]))


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="in_channels=0"):
        ChannelPad(0, 1, 1)
