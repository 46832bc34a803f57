"""`gracile list`: everything that has a name, with its source."""

from typing import Annotated

import typer

from gracile.cli import options as o
from gracile.cli.output import out


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("list")
    def list_(
        kind: Annotated[
            str | None, typer.Argument(metavar="[KIND]", help="method, criterion, model, ...")
        ] = None,
        json: o.Json = False,
    ) -> int:
        """List methods, kernels, models, data sets and runtimes."""
        import json as jsonlib

        from rich.markup import escape
        from rich.table import Table

        from gracile import registry
        from gracile.errors import UserError, nearest

        if kind is not None and kind not in registry.HOMES:
            raise UserError(f"unknown kind '{kind}'.{nearest(kind, registry.HOMES)}")
        rows = [e for k in ([kind] if kind else registry.HOMES) for e in registry.entries(k)]
        if json:
            print(
                jsonlib.dumps(
                    {
                        "format": 1,
                        "status": "ok",
                        "exit": 0,
                        "entries": [
                            {
                                "kind": e.kind,
                                "name": e.name,
                                "source": e.source,
                                "summary": e.summary,
                            }
                            for e in rows
                        ],
                    }
                )
            )
            return 0
        table = Table(box=None, pad_edge=False)
        for column in ("kind", "name", "what", "source"):
            table.add_column(column)
        for e in rows:
            table.add_row(*(escape(text) for text in (e.kind, e.name, e.summary, e.source)))
        out.print(table)
        return 0
