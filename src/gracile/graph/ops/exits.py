"""The choice among the answers of early exits."""

from gracile.graph.oprule import oprule
from gracile.graph.ops.elementwise import Broadcast


@oprule("exits", source="Teerapittayanon et al. 2016, arXiv:1709.01686")
class Exits(Broadcast):
    """One of several answers of one shape, row by row: classes are tied."""

    modules = ("gracile.nn.exits.Choice",)
