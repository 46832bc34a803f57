"""Which layers most blocks are for: dense convolutions over more than one place."""

from gracile.errors import UserError
from gracile.nn.chain import Layer


def check_dense(layer: Layer) -> None:
    """Refuse linear layers and grouped convolutions.

    Raises:
        UserError: says which it is.
    """
    if not layer.kernel:
        raise UserError("it is no convolution; for linear layers there is lowrank: factorize.")
    if layer.groups > 1:
        raise UserError(f"it has {layer.groups} groups already.")


def check_spatial(layer: Layer) -> None:
    """Refuse what looks at one place only.

    Raises:
        UserError: its kernel has one element.
    """
    if layer.kernel and layer.area == 1:
        raise UserError("its kernel has one place, so there is nothing to filter by itself.")
