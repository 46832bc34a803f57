"""`gracile summary`: layers, shapes, MACs and parameters of a model."""

import typer

from gracile.cli import options as o
from gracile.cli.output import out, write_text


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def summary(
        model: o.Model,
        weights: o.Weights = None,
        shape: o.Shape = "3,32,32",
        json: o.Json = False,
    ) -> int:
        """Print every operator with its output shape, MACs and parameters, and the totals."""
        import json as jsonlib

        import torch
        from rich.table import Table

        from gracile.analyze.cost import cost, totals
        from gracile.graph.capture import capture
        from gracile.models.spec import load_weights, resolve
        from gracile.units import human_bytes, human_count

        size = o.sizes(shape)
        net = resolve(model).model.eval()
        if weights is not None:
            load_weights(net, weights)
        graph = capture(net, torch.zeros(2, *size))
        rows, total = cost(net, graph), totals(net, graph)
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
                        "macs": total.macs,
                        "params": total.params,
                        "bytes": total.bytes,
                        "operators": [vars(r) for r in rows],
                    },
                    default=str,
                )
            )
            return 0
        table = Table(box=None, pad_edge=False)
        table.add_column("operator")
        table.add_column("kind")
        table.add_column("output")
        table.add_column("MACs", justify="right")
        table.add_column("parameters", justify="right")
        for r in rows:
            shape_out = graph[r.id].shape
            table.add_row(
                r.id,
                r.op,
                "x".join(str(n) for n in shape_out[1:]) if shape_out else "",
                f"{r.macs:,}" if r.macs else "",
                f"{r.params:,}" if r.params else "",
            )
        out.print(table)
        write_text(
            f"{model}: {human_count(total.macs)} MACs, {human_count(total.params)} parameters, "
            f"{human_bytes(total.bytes)}; captured by {graph.how}"
            + (f" ({graph.reason})" if graph.reason else "")
        )
        return 0
