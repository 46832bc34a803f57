"""`gracile inspect`: what a finished model's folder, or a file, holds: tensors, or an artifact."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gracile.cli import options as o
from gracile.cli.output import out, write_text


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def inspect(
        path: Annotated[
            Path,
            typer.Argument(
                metavar="RUN|FILE",
                help="A run directory (its packed.safetensors, if it has one), or a file.",
            ),
        ],
        json: o.Json = False,
    ) -> int:
        """Print what each stored tensor takes, how it is stored, and the ratio to plain tensors.

        Of an exported artifact (.onnx, .xml, .param, .pte, .tflite): what it says of itself.
        """
        import json as jsonlib

        from rich.table import Table

        from gracile.benchmark.artifact import RUNTIMES
        from gracile.train.checkpoint import inspected
        from gracile.units import human_bytes

        if RUNTIMES.get(path.suffix, "pytorch") != "pytorch":
            return _artifact(path, json)
        found = inspected(path)
        plain = sum(line.plain_bytes for line in found.lines)
        if json:
            print(
                jsonlib.dumps(
                    {
                        "format": 1,
                        "status": "ok",
                        "exit": 0,
                        "path": str(found.path),
                        "file_bytes": found.file_bytes,
                        "header_bytes": found.file_bytes - sum(n.bytes for n in found.lines),
                        "weight_bytes": found.weight_bytes,
                        "plain_bytes": plain,
                        "tensors": [asdict(line) for line in found.lines],
                    }
                )
            )
            return 0
        table = Table(box=None, pad_edge=False)
        for column in ("tensor", "shape", "type", "stored", "bytes", "plain"):
            table.add_column(column, justify="right" if column in ("bytes", "plain") else "left")
        for line in found.lines:
            shape = "x".join(str(n) for n in line.shape)
            table.add_row(
                line.name, shape, line.dtype, line.how, f"{line.bytes:,}", f"{line.plain_bytes:,}"
            )
        out.print(table)
        ratio = found.weight_bytes / found.file_bytes if found.file_bytes else 0.0
        write_text(
            f"{found.path}: {human_bytes(found.file_bytes)}; the weights alone, plain, are "
            f"{human_bytes(found.weight_bytes)}: {ratio:.2f}x"
        )
        return 0


def _artifact(path: Path, json: bool) -> int:
    """The facts that an exported file carries."""
    import json as jsonlib

    from gracile.benchmark.artifact import open_artifact
    from gracile.units import human_bytes

    found = open_artifact(path)
    if json:
        print(jsonlib.dumps({"format": 1, "status": "ok", "exit": 0, **found.to_dict()}))
        return 0
    inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found.inputs)
    write_text(
        f"{path}: {found.runtime}, {found.precision}, {human_bytes(found.size_bytes)}, "
        f"{len(found.units)} units, inputs {inputs}"
    )
    for name, value in sorted(found.metadata.items()):
        whole = value if isinstance(value, str) else jsonlib.dumps(value)
        write_text(f"{name}: {whole}")
    return 0
