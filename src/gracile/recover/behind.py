"""What makes up for quantization fires behind it: refused at bind, not after training."""

from collections.abc import Iterable
from typing import Any

from gracile.core.method import Method
from gracile.errors import BindError


def refuse_before(m: Method, s: Any, quantizers: Iterable[Method]) -> None:
    """Refuse a method that fires while none of these has.

    Args:
        m: the method.
        s: the Session.
        quantizers: of the recipe, at least one.

    Raises:
        BindError: names the first of them.
    """
    named = [(q.id, s.moment(q, "first")) for q in quantizers]
    mine = s.moment(m, "first")
    if mine is None or any(begins is None or begins < mine for _, begins in named):
        return
    raise BindError(
        f"'{m.id}' fires while nothing is quantized; put it behind the quantizer "
        f"'{named[0][0]}', at the same time or later."
    )
