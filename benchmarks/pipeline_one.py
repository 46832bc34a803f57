"""From cut to artifact for one network, in two processes that share nothing but files.

`python -m benchmarks.pipeline_one cut NAME FOLDER` prunes half of the channels and saves;
`python -m benchmarks.pipeline_one ship NAME FOLDER` rebuilds the network from the saved files,
quantizes it, exports both to both runtimes and proves every artifact. What came out is written to
`FOLDER/cut.json` and `FOLDER/ship.json`.
"""

import json
import resource
import sys
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gracile
from benchmarks.pipeline_nets import Network, networks
from gracile.core.plan import Architecture
from gracile.core.result import Result
from gracile.errors import GracileError, ParityError
from gracile.models.spec import ModelSpec, architecture_sha
from gracile.recipe.build import build, quantize
from gracile.train.checkpoint import load_model

MEMORY = 40 * 2**30  # of addresses, bytes
RATIO = 0.5
CALIBRATION = 4  # batches
RUNTIMES = ("onnxruntime", "openvino")


def cut(network: Network, folder: Path) -> dict[str, Any]:
    """Prune half of the channels, proven, and save; the outputs are kept for the next process."""
    torch.manual_seed(0)
    model, x = network.build(), network.inputs()
    before = _parameters(model)
    start = perf_counter()
    result = gracile.prune_channels(model, x, ratio=RATIO)
    seconds = perf_counter() - start
    gracile.save_model(folder, result)
    with torch.no_grad():
        save_file({"input": x, "output": result.model(x)}, folder / "seen.safetensors")
    return {
        "params": before,
        "params_after": _parameters(result.model),
        "cut_s": seconds,
        "warnings": [text for _, text in result.warnings],
    }


def ship(network: Network, folder: Path) -> dict[str, Any]:
    """Rebuild from the files, quantize, export to every runtime, prove each artifact."""
    torch.manual_seed(1)  # what is random here must not matter
    seen = load_file(folder / "seen.safetensors")
    x = seen["input"]
    loaded = load_model(folder, x, factory=lambda: _spec(network))
    with torch.no_grad():
        same = torch.equal(loaded.model(x), seen["output"])
    out: dict[str, Any] = {"reload_equal": same, "parity": {}, "problems": {}}
    _artifacts(out, "f32", Result(loaded.model, loaded.plan, tensors=loaded.tensors), x, folder)
    if network.quantize:
        start = perf_counter()
        int8 = gracile.compress(
            loaded.model,
            build(methods={"int8": quantize("ptq")}),
            example=x,
            calibration=[network.inputs() for _ in range(CALIBRATION)],
        )
        out["quantize_s"] = perf_counter() - start
        _artifacts(out, "int8", int8, x, folder)
    return out


def _artifacts(out: dict[str, Any], kind: str, result: Result, x: Tensor, folder: Path) -> None:
    for runtime in RUNTIMES:
        key = f"{kind}.{runtime}"
        try:
            artifact = gracile.export(result, runtime, folder / key, example=x)
        except ParityError as e:
            out["problems"][key] = str(e)
            out["parity"][key] = False
            continue
        except GracileError as e:
            out["problems"][key] = f"{type(e).__name__}: {e}"
            out["parity"][key] = False
            continue
        out["parity"][key] = True
        out[f"{key}.bytes"] = artifact.size_bytes
        out[f"{key}.precision"] = artifact.precision


def _spec(network: Network) -> ModelSpec:
    model = network.build()
    about = Architecture(name=network.name, sha256=architecture_sha(model))
    return ModelSpec(model, about, network.name, network.package)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main(step: str, name: str, folder: Path) -> None:
    """Do one step and write what came out."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")  # of the architectures' own packages
    torch.set_num_threads(1)
    found = {"cut": cut, "ship": ship}[step](networks()[name], folder)
    (folder / f"{step}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
