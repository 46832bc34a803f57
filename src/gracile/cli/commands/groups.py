"""`gracile groups`: which channels must be cut together, what they cost, and what is protected."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gracile.cli import options as o
from gracile.cli.output import out, write_text

if TYPE_CHECKING:
    from gracile.analyze.widths import CostModel
    from gracile.graph.dependency import ChannelGroup


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def groups(
        model: o.Model,
        weights: o.Weights = None,
        data: Annotated[
            str | None,
            typer.Option(
                "--data", metavar="SPEC", help="Take the input's shape and the classes from here."
            ),
        ] = None,
        shape: o.Shape = "3,32,32",
        all_: Annotated[
            bool, typer.Option("--all", help="Name every layer that writes or reads a group.")
        ] = False,
        json: o.Json = False,
    ) -> int:
        """List the groups of coupled channels: units, layers, cost, and why one is protected.

        Parameters and MACs are what would go with the whole group. A layer between two groups
        counts in both, so they do not add up to the model.
        """
        import json as jsonlib

        import torch

        from gracile.analyze.widths import CostModel
        from gracile.data.sets import open_data
        from gracile.graph.capture import capture
        from gracile.graph.dependency import channel_groups
        from gracile.models.spec import load_weights, resolve

        bundle = open_data(data) if data is not None else None
        size = bundle.shape if bundle is not None else o.sizes(shape)
        net = resolve(model, num_classes=bundle.classes if bundle else None).model.eval()
        if weights is not None:
            load_weights(net, weights)
        graph = capture(net, torch.zeros(2, *size))
        found = channel_groups(net, graph)
        cost = CostModel.of(net, graph, found)
        if json:
            print(
                jsonlib.dumps(
                    {
                        "format": 1,
                        "status": "ok",
                        "exit": 0,
                        "model": model,
                        "captured_by": graph.how,
                        "reason": graph.reason,
                        "params": cost.total("params", {}),
                        "macs": cost.total("macs", {}),
                        "groups": [_described(g, cost) for g in found],
                    }
                )
            )
            return 0
        out.print(_table(found, cost))
        for line in _notes(found, all_):
            write_text(line)
        free = [g for g in found if g.protected is None]
        write_text(
            f"{model}: {len(free)} of {len(found)} groups can be cut, "
            f"{sum(len(g.units) for g in free):,} units; captured by {graph.how}"
            + (f" ({graph.reason})" if graph.reason else "")
        )
        return 0


def _described(group: "ChannelGroup", cost: "CostModel") -> dict[str, Any]:
    """A group as JSON; `units` of a member are its indices, unit by unit."""
    members: dict[tuple[str, int], list[list[int]]] = {
        axis: [[] for _ in group.units] for axis in group.sizes
    }
    for u, unit in enumerate(group.units):
        for part in unit:
            members[part.at, part.dim][u].extend(part.index)
    return {
        "id": group.id,
        "kind": group.kind,
        "units": len(group.units),
        "overlaps": list(group.overlaps),
        "protected": group.protected,
        "params": cost.touched("params", group),
        "macs": cost.touched("macs", group),
        "producers": list(group.producers),
        "consumers": list(group.consumers),
        "members": [
            {"at": at, "dim": dim, "of": group.sizes[at, dim], "units": units}
            for (at, dim), units in members.items()
        ],
    }


def _table(groups: "list[ChannelGroup]", cost: "CostModel") -> Any:
    from rich.table import Table

    from gracile.units import human_count

    table = Table(box=None, pad_edge=False)
    table.add_column("group", overflow="fold")
    table.add_column("kind")
    for name in ("units", "writers", "readers", "parameters", "MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for g in groups:
        table.add_row(
            g.id,
            g.kind if g.protected is None else "protected",
            f"{len(g.units):,}",
            str(len(g.producers)),
            str(len(g.consumers)),
            human_count(cost.touched("params", g)),
            human_count(cost.touched("macs", g)),
        )
    return table


def _notes(groups: "list[ChannelGroup]", full: bool) -> list[str]:
    """Why groups are protected; if `full`, also the layers of each."""
    lines = []
    for g in groups:
        if full:
            lines.append(f"{g.id}: written by {_names(g.producers)}; read by {_names(g.consumers)}")
        if g.protected is not None:
            lines.append(f"{g.id}: protected, {g.protected}")
    return lines


def _names(addresses: tuple[str, ...]) -> str:
    return ", ".join(a.removesuffix(".weight") for a in addresses) or "nothing"
