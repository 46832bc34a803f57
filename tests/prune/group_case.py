"""Channel groups made by hand, as the analysis would find them."""

from gracile.graph.dependency import ChannelGroup, Slice


def chain(name: str, units: int, *, reader: str | None = None, **more) -> ChannelGroup:
    """`name.weight` writes `units` channels; `reader.weight` reads them."""
    axes = [(f"{name}.weight", 0), *([(f"{reader}.weight", 1)] if reader else [])]
    return ChannelGroup(
        id=f"{name}.weight",
        units=tuple(tuple(Slice(at, dim, (u,)) for at, dim in axes) for u in range(units)),
        producers=(f"{name}.weight",),
        consumers=(f"{reader}.weight",) if reader else (),
        protected=more.pop("protected", None),
        sizes=dict.fromkeys(axes, units),
        writes={f"{name}.weight": 0},
        **{"kind": "channels", "overlaps": (), **more},
    )


def heads(name: str, count: int, width: int) -> tuple[ChannelGroup, ChannelGroup]:
    """One weight of `count` heads of `width` channels: the group of heads, that of their width."""
    at = f"{name}.weight"
    sizes, writes = {(at, 0): count * width}, {at: 0}
    outer = [tuple(range(h * width, (h + 1) * width)) for h in range(count)]
    inner = [tuple(range(d, count * width, width)) for d in range(width)]
    return tuple(
        ChannelGroup(
            id=f"{at}:{kind}",
            units=tuple((Slice(at, 0, index),) for index in units),
            producers=(at,),
            consumers=(),
            protected=None,
            sizes=sizes,
            writes=writes,
            kind=kind,
            overlaps=(f"{at}:{other}",),
        )
        for kind, other, units in (("outer", "inner", outer), ("inner", "outer", inner))
    )
