"""Preflight of networks with one known obstacle each."""

import math

import pytest
import torch
from torch import nn

from gracile.analyze.preflight import amdahl
from gracile.errors import UserError
from gracile.train.preflight import preflight


def net(width=16, last=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, last),
    )  # fmt: skip


def look(model, runtime="openvino", shape=(2, 3, 8, 8), **options):
    return preflight(model, torch.zeros(*shape), runtime, measure=False, **options)


def found(result):
    return {f.code: f for f in result.findings}


def test_numbers_of_a_layer_by_hand():
    result = look(net())
    first, second, head = result.layers
    assert (first.layer, first.width, first.macs) == ("0", 16, 64 * 16 * 27)
    assert first.bytes == 4 * (3 * 64 + 16 * 64 + 16 * 27)
    assert second.macs_per_byte == pytest.approx(
        64 * 32 * 144 / (4 * (16 * 64 + 32 * 64 + 32 * 144))
    )
    assert sum(n.share_of_macs for n in result.layers) == pytest.approx(1)
    assert (first.can_be_cut, head.can_be_cut) == ("yes", "it is an output of the model")
    assert (first.integer, head.integer) == ("yes", "yes")


def test_an_ordinary_network_has_two_notes_only():
    assert set(found(look(net()))) == {"memory-bound", "protected"}  # the head, the logits
    assert found(look(net()))["memory-bound"].where == ("7",)


def test_dead_filters_of_weights_and_of_batch_norm():
    model = net()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[1].weight[5] = 0
        model[3].weight[1] = 0
    finding = found(look(model))["dead-channels"]
    assert finding.where == ("0", "3")
    assert finding.text.startswith("3 filters of 2 layers")


def test_widths_off_the_period():
    finding = found(look(net(width=20)))["uneven-widths"]
    assert finding.where == ("0",)
    assert "multiple_of: 16" in finding.text
    assert "uneven-widths" not in found(look(net(width=20), period=4))


class Fixed(nn.Module):
    """Written for one batch size and one resolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 64, 4)

    def forward(self, x):
        return self.head(self.conv(x).reshape(2, 16 * 64))


def test_hard_coded_shapes_are_found_by_trying():
    result = found(look(Fixed()))
    assert "does not run for another batch size" in result["fixed-batch"].text
    assert "written for 8x8 pixels" in result["fixed-resolution"].text


def test_layers_without_an_integer_kernel_say_why():
    model = nn.Sequential(nn.ConvTranspose2d(3, 16, 2, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3))
    result = look(model)
    finding = found(result)["no-integer-kernel"]
    assert finding.where == ("0",)
    assert result.layers[0].integer not in ("", "yes")
    share = result.layers[1].share_of_macs
    (integers,) = (b for b in result.bounds if b.what == "integers")
    assert integers.ratio == pytest.approx(1 / (1 - share + share / 4))


def test_the_bound_of_channels_by_hand():
    (bound,) = (b for b in look(net()).bounds if b.what == "channels")
    before = 64 * 16 * 27 + 64 * 32 * 144 + 320
    after = 64 * 27 + 64 * 9 + 10  # one channel between all layers
    assert bound.kind == "arithmetic"
    assert bound.ratio == pytest.approx(before / after)


def test_a_measured_bound_comes_first_and_the_model_stays(tmp_path):
    model = net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = preflight(model, torch.zeros(2, 3, 8, 8), "onnxruntime")
    assert [b.kind for b in result.bounds if b.what == "channels"] == ["measured", "arithmetic"]
    assert "no choice of channels is faster" in result.bounds[0].text
    assert result.bounds[0].ratio > 0
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    result.save(tmp_path)
    lines = (tmp_path / "preflight.csv").read_text().splitlines()
    assert lines[0].startswith("layer,op,width,share_of_macs,macs,bytes")
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "3", "7"]


def test_a_runtime_without_a_profile_says_so():
    result = look(net(), runtime="pytorch")
    assert result.notes["integers"] == "nothing is known of integer kernels in pytorch"
    assert all(n.integer == "" for n in result.layers)


def test_nothing_to_cut_is_a_bound_of_one():
    (bound,) = (b for b in look(nn.Sequential(nn.Conv2d(3, 8, 1))).bounds if b.what == "channels")
    assert (bound.ratio, bound.text) == (1.0, "no group of channels can be cut")


def test_amdahl():
    assert amdahl(0.0) == 1
    assert amdahl(1.0) == math.inf
    assert amdahl(0.75) == 4


def test_refusals():
    with pytest.raises(UserError, match="unknown runtime 'openvin'"):
        look(net(), runtime="openvin")
    with pytest.raises(UserError, match="must be positive, got 0 and 4"):
        look(net(), period=0)
