"""The picture of a network: layers, order, and a well-formed file."""

import xml.etree.ElementTree as ET

import torch
from torch import nn

from gracile.graph.capture import capture
from gracile.graph.graph import Node
from gracile.report.drawing import draw, ordered


def test_layers_are_longest_paths_from_the_input():
    nodes = [
        Node("x", "input"), Node("a", "conv", ("x",)), Node("b", "relu", ("a",)),
        Node("y", "add", ("b", "x")), Node("output", "output", ("y",)),
    ]  # fmt: skip
    assert ordered(nodes) == [["x"], ["a"], ["b"], ["y"], ["output"]]


def test_what_reads_the_left_stands_left():
    nodes = [
        Node("x", "input"), Node("l", "conv", ("x",)), Node("r", "conv", ("x",)),
        Node("rr", "relu", ("r",)), Node("ll", "relu", ("l",)),
    ]  # fmt: skip
    assert ordered(nodes)[2] == ["ll", "rr"]


def test_every_operator_is_a_box_and_every_tensor_an_arrow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.relu(self.conv(x)) + x

    graph = capture(Net(), torch.zeros(2, 3, 4, 4))
    root = ET.fromstring(draw(graph, {"conv": "a <note>"}))
    space = {"s": "http://www.w3.org/2000/svg"}
    titles = [t.text for t in root.iterfind(".//s:g/s:title", space)]
    assert titles == ["x: input 3x4x4", "conv: conv 3x4x4", "relu: relu 3x4x4", "add: add 3x4x4",
                      "output: output 3x4x4"]  # fmt: skip
    assert len(root.findall("./s:path", space)) == 5
    assert "a <note>" in [t.text for t in root.iterfind(".//s:text", space)]
