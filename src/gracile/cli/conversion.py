"""`gracile recipe convert`: a file of another tool as a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gracile.cli import options as o
from gracile.cli.output import log, write_text

Old = Annotated[
    Path,
    typer.Argument(
        metavar="OLD", help="A schedule of Distiller (YAML), or a configuration of NNCF (.json)."
    ),
]
New = Annotated[
    Path | None, typer.Option("--out", metavar="NEW", help="Write the recipe here, not to stdout.")
]


def add(group: typer.Typer) -> None:
    """Add the command to `gracile recipe`."""

    @group.command()
    def convert(
        old: Old,
        to: New = None,
        epochs: Annotated[
            int | None,
            typer.Option("--epochs", min=0, help="Default: the last end of all policies."),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option("--model", metavar="MODEL", help="NNCF: whose layers its scopes name."),
        ] = None,
        batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images.")] = 256,
        lr: Annotated[float, typer.Option("--lr", help="First learning rate.")] = 0.1,
        momentum: Annotated[float, typer.Option("--momentum", help="Of SGD.")] = 0.9,
        weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of SGD.")] = 1e-4,
        set_: o.Set = None,
        json: o.Json = False,
    ) -> int:
        """Print a file of Distiller or NNCF as a recipe; what cannot be the same is told on stderr.

        Firings, spans, levels and masks are those of the file. What Distiller takes from its
        command line are options here, with its defaults; NNCF's files say it themselves.
        """
        import json as jsonlib

        from gracile.core.state import write_atomic
        from gracile.recipe.distiller import Training, convert
        from gracile.recipe.document import Document, dump
        from gracile.recipe.load import loads, read
        from gracile.recipe.patch import overridden

        if old.suffix == ".json":
            found = _from_nncf(old, epochs, model)
        else:
            training = Training(epochs, batch_size, lr, momentum, weight_decay)
            compat = [t for t in set_ or [] if t.partition("=")[0].strip() == "compat"]
            asked = overridden(Document("", {}), compat).data.get("compat")
            found = convert(read(old), str(old), training, strict=asked == "strict")
        data: dict[str, Any] = overridden(found.document, set_ or []).data
        text = dump(data)
        if all(code != "no-method" for code, _ in found.warnings):
            loads(text, str(to or "<converted>"))
        if to is not None:
            write_atomic(to, text.encode())
        if json:
            warnings = [{"code": code, "text": said} for code, said in found.warnings]
            result = {"format": 1, "status": "ok", "exit": 0, "recipe": data}
            print(jsonlib.dumps({**result, "out": to and str(to), "warnings": warnings}))
            return 0
        for code, said in found.warnings:
            log.print(f"warning {code}: {said}", markup=False, soft_wrap=True)
        write_text(text if to is None else f"{to}: {len(data['methods'])} method(s)")
        return 0


def _from_nncf(old: Path, epochs: int | None, model: str | None) -> Any:
    from gracile.models.spec import resolve
    from gracile.recipe import nncf
    from gracile.recipe.distiller import Converted
    from gracile.recipe.document import Document
    from gracile.recipe.load import read

    network = resolve(model).model if model is not None else None
    data, told = nncf.convert(read(old), name=str(old), epochs=epochs, model_names=network)
    return Converted(Document(str(old), data), tuple(("nncf", text) for text in told))
