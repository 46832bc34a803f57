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
                help="Artifacts (.onnx, .xml, .param, .pte) or one finished run directory.",
            ),
        ],
        runtime: o.Runtimes = None,
        threads: o.Threads = 1,
        hint: o.Hint = "f32",
        batch: o.Batch = 1,
        rounds: Annotated[int, typer.Option("--rounds", min=5, help="Interleaved rounds.")] = 9,
        records: Annotated[
            Path | None, typer.Option("--records", metavar="FILE", help="Append Records here.")
        ] = None,
        json: o.Json = False,
    ) -> int:
        """Warm up, interleave, and report median, p95, spread and the ratio to the first.

        An .xml runs in openvino, a .param in ncnn, a .pte in executorch; an .onnx in onnxruntime
        unless --runtime says openvino. A run directory means its dense and compressed artifacts, in
        each runtime it has (or is asked).
        """
        import json as jsonlib

        from rich.table import Table

        from gracile.core.record import RecordLog
        from gracile.train.measure import measure

        found = measure(
            artifacts, runtimes=tuple(runtime or ()), threads=threads, hint=hint, batch=batch,
            rounds=rounds,
        )  # fmt: skip
        if records is not None:
            RecordLog(records).add(*found)
        if json:
            print(jsonlib.dumps({"format": 1, "status": "ok", "exit": 0,
                                 "records": [r.to_dict() for r in found]}))  # fmt: skip
            return 0
        table = Table(box=None, pad_edge=False)
        for column in ("runtime", "model", "median ms", "p95 ms", "IQR ms", "speed-up", "95 % CI"):
            table.add_column(column, justify="left" if column in ("runtime", "model") else "right")
        ratios = {(r.runtime, r.subject.get("model")): r for r in found if r.metric == "speedup"}
        for r in found:
            if r.metric != "latency_ms":
                continue
            ratio = ratios.get((r.runtime, r.subject.get("model")))
            table.add_row(
                str(r.runtime),
                r.subject.get("model", ""),
                f"{r.value:.4f}",
                f"{r.p95:.4f}" if r.p95 is not None else "",
                f"{r.iqr:.4f}" if r.iqr is not None else "",
                f"{ratio.value:.2f}x" if ratio else "1 (reference)",
                f"{ratio.ci95[0]:.2f} to {ratio.ci95[1]:.2f}" if ratio and ratio.ci95 else "",
            )
        out.print(table)
        write_text(f"{threads} thread(s), batch {batch}, precision hint {hint} for every side")
        return 0
