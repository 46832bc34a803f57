"""`gracile demo`: the whole way on a small real network, in minutes, with data that ships along."""

import importlib.resources
from pathlib import Path
from typing import Annotated

import typer

from gracile.cli import options as o
from gracile.cli.output import out as console
from gracile.cli.output import say, show

MODEL = "resnet20_cifar_a"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Run directory.")] = Path(
            "runs/demo"
        ),
        runtime: o.Runtimes = None,
        resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out."),
        json: o.Json = False,
    ) -> int:
        """Train ResNet-20 on scikit-learn's digits, then prune, distil, quantize and measure it."""
        from gracile.recipe.load import loads
        from gracile.report.html import write
        from gracile.train.job import Job
        from gracile.train.run import run

        recipes = importlib.resources.files("gracile.cli") / "demo"
        runtimes = tuple(runtime or ("openvino", "onnxruntime"))

        def recipe(name: str):  # type: ignore[no-untyped-def]
            return loads((recipes / name).read_text(), name=name)

        baseline = Job(
            model=MODEL, data="digits", recipe=recipe("baseline.yaml"), out=out / "baseline",
            progress=not json, command="gracile demo", say=say,
        )  # fmt: skip
        say("baseline: ResNet-20 from scratch on digits")
        trained = run(baseline, resume=resume)
        compressed = Job(
            model=MODEL, data="digits", recipe=recipe("compress.yaml"), out=out / "compressed",
            weights=baseline.out / "model.safetensors", runtimes=runtimes,
            progress=not json, command="gracile demo", say=say,
        )  # fmt: skip
        if not json:
            console.print(
                f"baseline top-1 on digits (test): {100 * trained['after']['top1']:.2f} %"
            )
        result = run(compressed, resume=resume)
        say("report")
        write(compressed.out)
        return show(result, json)
