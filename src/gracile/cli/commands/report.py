"""`gracile report`: write a run's report page again, for example with a newer gracile."""

from pathlib import Path
from typing import Annotated

import typer

from gracile.cli.output import need_file, show, write_text


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def report(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
        markdown: bool = typer.Option(False, "--markdown", help="Print Markdown tables instead."),
        json: bool = typer.Option(False, "--json", help="Print result.json instead."),
    ) -> int:
        """Write report.html of a finished run and print its table."""
        import json as jsonlib

        from gracile.report.html import write
        from gracile.report.tables import markdown as to_markdown

        need_file(run / "result.json", "finished run (result.json); run it with --resume first")
        result = jsonlib.loads((run / "result.json").read_text())
        write(run)
        if markdown:
            write_text(to_markdown(result))
        else:
            show(result | {"out": str(run)}, json)
        return 0
