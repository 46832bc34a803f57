"""`gracile agent`: measure, on this device, what coordinators ask for; needs no torch."""

from pathlib import Path
from typing import Annotated

import typer

from gracile.cli.output import say, write_text


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def agent(
        coordinators: Annotated[
            list[str],
            typer.Argument(
                metavar="URL|DIR [...]", help="Whose jobs to measure: URLs, or folders of jobs."
            ),
        ],
        runtime: Annotated[
            list[str] | None,
            typer.Option(
                "--runtime", metavar="NAME", help="Only jobs of these; default: what is installed."
            ),
        ] = None,
        idle: Annotated[
            float | None,
            typer.Option(
                "--idle", min=0, metavar="SECONDS", help="End after so long without a job."
            ),
        ] = None,
        name: Annotated[
            str | None, typer.Option("--name", help="Who measures; default: the host's name.")
        ] = None,
        serve: Annotated[
            str | None,
            typer.Option(
                "--serve",
                metavar="[HOST:]PORT",
                help="Measure nothing: hand the jobs of one folder out over HTTP.",
            ),
        ] = None,
        secret: Annotated[
            str | None,
            typer.Option(
                "--secret", envvar="GRACILE_SECRET", help="What requests over HTTP must bring."
            ),
        ] = None,
        json: Annotated[
            bool, typer.Option("--json", help="One JSON object on stdout; logs on stderr.")
        ] = False,
    ) -> int:
        """Take jobs in turn, measure one at a time, give the Records back.

        Of several coordinators the one that was served for the shortest time comes next. A job is
        leased: if this agent dies, another gets it.
        """
        import json as jsonlib

        from gracile.benchmark.agent import Agent, runtimes_here, table_at

        if serve is not None:
            return _serve(coordinators, serve, secret)
        tables = {place: table_at(place, secret) for place in coordinators}
        mine = Agent(tables, runtime or runtimes_here(), name=name, say=say)
        say(f"{mine.name} measures for {', '.join(tables)}: {', '.join(mine.runtimes)}")
        count = mine.work(idle)
        if json:
            served = {place: round(s, 3) for place, s in mine.served.items()}
            print(jsonlib.dumps({"format": 1, "status": "ok", "exit": 0, "jobs": count,
                                 "seconds": served}))  # fmt: skip
        else:
            write_text(f"{count} job(s)")
        return 0


def _serve(places: list[str], address: str, secret: str | None) -> int:
    from gracile.benchmark.jobs import JobTable
    from gracile.benchmark.jobs_http import server
    from gracile.errors import UserError

    host, _, port = address.rpartition(":")
    if len(places) != 1 or "://" in places[0] or not port.isdigit():
        raise UserError(
            f"--serve hands out one folder at [HOST:]PORT, got {', '.join(places)} at {address}."
        )
    with server(JobTable(Path(places[0])), host or "127.0.0.1", int(port), secret) as http:
        say(f"{places[0]} at http://{host or '127.0.0.1'}:{http.server_port}")
        http.serve_forever()
    return 0
