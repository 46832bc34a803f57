"""`gracile benchmark`: time artifacts side by side, the way a claim needs it."""

from pathlib import Path
from typing import Annotated

import typer

from gracile.cli import options as o
from gracile.cli.output import out, write_text


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def benchmark(
        artifacts: Annotated[
            list[Path],
            typer.Argument(
                metavar="A [B ...]",
                help="Artifacts (.onnx, .xml, .param, .pte, .tflite) or one finished run.",
            ),
        ],
        runtime: o.Runtimes = None,
        threads: o.Threads = 1,
        hint: o.Hint = "f32",
        batch: o.Batch = 1,
        rounds: Annotated[int, typer.Option("--rounds", min=5, help="Interleaved rounds.")] = 9,
        layers: Annotated[
            bool, typer.Option("--layers", help="Also each layer, by the runtime's own counters.")
        ] = False,
        streams: Annotated[
            int | None,
            typer.Option("--streams", min=1, help="Also images/s of so many inferences at once."),
        ] = None,
        memory: Annotated[
            bool, typer.Option("--memory", help="Also the peak of memory, in another process.")
        ] = False,
        reference: Annotated[
            Path | None,
            typer.Option(
                "--reference", metavar="FILE", help="Timed in every round, to compare days by."
            ),
        ] = None,
        jobs: Annotated[
            Path | None,
            typer.Option(
                "--jobs", metavar="DIR", help="Not here: a `gracile agent` measures DIR's jobs."
            ),
        ] = None,
        records: Annotated[
            Path | None, typer.Option("--records", metavar="FILE", help="Append Records here.")
        ] = None,
        json: o.Json = False,
    ) -> int:
        """Warm up, interleave, and report median, p95, spread and the ratio to the first.

        An .xml runs in openvino, a .param in ncnn, a .pte in executorch, a .tflite in litert; an
        .onnx in onnxruntime unless --runtime says openvino. A run directory means its dense and
        compressed artifacts, in each runtime it has (or is asked).
        """
        import json as jsonlib

        from gracile.core.record import RecordLog
        from gracile.report.measured import tables
        from gracile.train.measure import measure

        found = measure(
            artifacts, runtimes=tuple(runtime or ()), threads=threads, hint=hint, batch=batch,
            rounds=rounds, layers=layers, streams=streams, memory=memory, reference=reference,
            jobs=jobs,
        )  # fmt: skip
        if records is not None:
            RecordLog(records).add(*found)
        if json:
            print(jsonlib.dumps({"format": 1, "status": "ok", "exit": 0,
                                 "records": [r.to_dict() for r in found]}))  # fmt: skip
            return 0
        for table in tables(found):
            out.print(table)
        write_text(f"{threads} thread(s), batch {batch}, precision hint {hint} for every side")
        return 0
