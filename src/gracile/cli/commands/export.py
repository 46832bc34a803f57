"""`gracile export`: a finished run, or a plain model, as an artifact of a runtime, proven equal."""

from typing import Annotated

import typer

from gracile.cli import options as o
from gracile.cli.output import write_text


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def export(
        model: Annotated[
            str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a model spec.")
        ],
        runtime: Annotated[str, typer.Option("--runtime", metavar="NAME", help="Target runtime.")],
        out: o.Out,
        weights: o.Weights = None,
        data: o.Data = "digits",
        json: o.Json = False,
    ) -> int:
        """Export, then check that the artifact computes what PyTorch computes, on real inputs."""
        import json as jsonlib

        from gracile.train.run import export_only

        found = export_only(model, runtime, out, weights=weights, data=data)
        if json:
            print(jsonlib.dumps({"format": 1, "status": "ok", "exit": 0, "out": str(out), **found}))
        else:
            p = found["parity"]
            write_text(f"artifact: {found['artifact']['path']}")
            write_text(
                f"parity: max |difference| {p['max_abs']:.3g}, cosine {p['cosine']:.6f}, "
                f"same answer on {100 * p['agreement']:.1f} % of the samples"
            )
        return 0
