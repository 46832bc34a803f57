"""Tables and units made up for the tests of the latency room."""

from gracile.latency.difference import Point
from gracile.latency.table import Network, Table
from gracile.latency.unit import Setting, Unit

HERE = Setting("openvino", "2026.4", "a processor")
FACTS = {"kernel": [3, 3], "size": [8, 8], "precision": "f32"}


def conv(*widths, **facts):
    """A convolution of these widths."""
    return Unit.of("conv", widths, {**FACTS, **facts})


def point(ms, noise=0.0, when=1.0):
    """A measured time."""
    return Point(ms, noise, 14, when)


def filled(cost, widths, setting=HERE):
    """A table whose convolutions take `cost(in, out)` ms at every pair of these widths."""
    table = Table()
    times = table.at(setting)
    times.points |= {conv(i, o): point(cost(i, o)) for i in widths for o in widths}
    times.networks["net"] = Network(1.0, 1.0, 2.0)
    return table
