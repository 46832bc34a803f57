"""Options that several commands share, each written once."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Registered name (see `gracile list model`), file.py:factory, torchvision:NAME, "
        "timm:NAME or hf:DIR; arguments as NAME?key=value&key=value.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weights: .safetensors, or .pt/.pth."),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="digits, cifar10, parquet:DIR or imagefolder:DIR.",
    ),
]
RecipeFile = Annotated[Path, typer.Option("--recipe", metavar="FILE", help="The recipe (YAML).")]
Runtimes = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        metavar="NAME[:DEVICE]",
        help="Where the model will run: onnxruntime, openvino, ncnn, executorch, litert or "
        "pytorch. Repeatable.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Run directory.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value. Repeatable."),
]
Shape = Annotated[str, typer.Option("--shape", metavar="C,H,W", help="Shape of one input.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; logs on stderr.")]
Device = Annotated[str, typer.Option("--device", help="Where it trains: cpu or cuda:i.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of the measured runtimes.")]
TorchThreads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of PyTorch; default its own choice.")
]
Split = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="PART",
        help="train, val, test, calibration, or rows of the set's own splits: 'test[5000:]'.",
    ),
]
Images = Annotated[
    int, typer.Option("--images", min=0, metavar="N", help="So many of them, drawn once; 0: all.")
]
Hint = Annotated[
    str,
    typer.Option("--hint", help="Precision hint of the runtime, for both sides: f32, bf16 or f16."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Batch size of the measurement.")]


def sizes(shape: str) -> tuple[int, ...]:
    """The numbers of `--shape`."""
    from gracile.errors import UserError

    try:
        found = tuple(int(n) for n in shape.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"--shape must be like 3,32,32, got '{shape}'.")
    return found
