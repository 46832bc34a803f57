"""SAMPLE DATA, MADE UP: a run directory as a finished run leaves it, for report tests only."""

import json
import math
import random
from pathlib import Path

from gracile.analyze.ledger import Inventory, Operator, build
from gracile.core.plan import Architecture, Bits, Member, Plan, Remove
from gracile.core.record import Record, RecordLog

EVIL = "<script>document.title='owned'</script>"
STAGES = ((16, 32), (32, 16), (64, 8))  # channels and height of the three stages


def layers():
    """(id, channels before, channels after, input channels, height) of a sample network."""
    rng = random.Random(1)
    out = [("conv1", 16, 16, 3, 32)]
    for stage, (width, height) in enumerate(STAGES, 1):
        for block in range(3):
            kept = round(width * rng.uniform(0.35, 0.8))
            out.append((f"layer{stage}.{block}.conv1", width, kept, width, height))
            out.append((f"layer{stage}.{block}.conv2", width, width, width, height))
    return out


def result():
    """The `--json` object of the sample run."""
    rows = [
        {
            "id": id, "op": "conv", "channels_before": old, "channels_after": new,
            "bits": 32 if id == "conv1" else 8,
            "sparsity": 0.02 * (number % 5),
            "macs_before": old * wide * 9 * height**2, "macs_after": new * wide * 6 * height**2,
        }
        for number, (id, old, new, wide, height) in enumerate(layers())
    ]  # fmt: skip
    rows.append(
        {"id": "fc", "op": "linear", "channels_before": 10, "channels_after": 10, "bits": 8,
         "sparsity": 0.0, "macs_before": 640, "macs_after": 640}
    )  # fmt: skip
    return {
        "format": 1, "status": "goal missed", "exit": 1, "out": "runs/sample",
        "goal": {
            "speedup": 2.5, "latency_ms": None, "size_mb": 0.3, "max_drop": 1.0, "met": False,
            "checks": [
                {"what": "speed-up in openvino", "wanted": 2.5, "got": 2.413, "met": False},
                {"what": "speed-up in onnxruntime", "wanted": 2.5, "got": 1.879, "met": False},
                {
                    "what": "artifact size in openvino (MB)", "wanted": 0.3, "got": 0.224,
                    "met": True,
                },
                {"what": "top-1 drop (points)", "wanted": 1.0, "got": 0.61, "met": True},
            ],
        },
        "before": {
            "top1": 0.9255, "top5": 0.9978, "loss": 0.2871, "macs": 40_551_040, "params": 269_722,
            "bytes": 1_092_568, "latency": {"openvino": 0.842, "onnxruntime": 1.103},
            "accuracy": {"openvino": 0.9255, "onnxruntime": 0.9255},
            "artifact_bytes": {"openvino": 1_120_000, "onnxruntime": 1_101_000},
        },
        "after": {
            "top1": 0.9194, "top5": 0.9971, "loss": 0.3022, "macs": 21_840_128, "params": 151_206,
            "bytes": 188_416, "latency": {"openvino": 0.349, "onnxruntime": 0.587},
            "accuracy": {"openvino": 0.9194, "onnxruntime": 0.9196},
            "artifact_bytes": {"openvino": 224_000, "onnxruntime": 212_000},
        },
        "stages": {
            "dense": {"top1": 0.9255, "top5": 0.9978, "loss": 0.2871, "split": "test"},
            "cut": {"top1": 0.6113, "top5": 0.9514, "loss": 1.4480, "split": "val"},
            "recovered": {"top1": 0.9194, "top5": 0.9971, "loss": 0.3022, "split": "test"},
        },
        "speedup": {
            "openvino": {"ratio": 2.413, "ci95": [2.361, 2.467]},
            "onnxruntime": {"ratio": 1.879, "ci95": [1.842, 1.911]},
        },
        "parity": {
            "openvino": {
                "precision": "int8", "max_abs": 0.0312, "max_lsb": 1.0, "cosine": 0.999981,
                "agreement": 0.9991, "first_bad": None,
            },
            "onnxruntime": {
                "precision": "int8", "max_abs": 0.0287, "max_lsb": 1.0, "cosine": 0.999987,
                "agreement": 0.9993, "first_bad": None,
            },
        },
        "agreement": {
            "openvino": {
                "share": 0.9612, "flips": 388, "worst_class": 3, "worst_class_drop": 2.1,
                "lost": 217, "gained": 156,
                "mcnemar_p": 0.0021, "n": 10000,
            },
            "onnxruntime": {
                "share": 0.9615, "flips": 385, "worst_class": 3, "worst_class_drop": 2.1,
                "lost": 217, "gained": 156,
                "mcnemar_p": 0.0004, "n": 10000,
            },
        },
        "kernels": {
            "openvino": {"integer": 20, "float": 3, "convolutions": 19, "convolutions_integer": 18},
            "onnxruntime": {
                "integer": 29, "float": 4, "convolutions": 19, "convolutions_integer": 18,
            },
        },
        "layers": rows,
        "data": {
            "name": "sample-data",
            "splits": {
                "train": "45 000 of 50 000 made-up training images",
                "val": "5 000 held out of the training images, seed 0",
                "test": "10 000, used once, at the end",
            },
        },
        "measurement": {"threads": 1, "precision_hint": "f32", "batch": 1, "rounds": 7},
        "versions": {"gracile": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "seed": 0,
        "warnings": [
            {"code": "first_layer_float", "text": "conv1 stays in float: 0.8 points at 8 bits."},
            {"code": "noisy_machine", "text": "Load average was 1.7 on 2 cores while measuring."},
            {"code": "sample", "text": "This is made-up sample data."},
        ],
    }  # fmt: skip


def ledger(method="int8"):
    """What became of the sample network."""
    before = Inventory(
        {f"{id}.weight": (old * wide * 9, 0) for id, old, _, wide, _ in layers()},
        {
            id: Operator("conv", old * wide * 9 * h * h, f"{id}.weight")
            for id, old, _, wide, h in layers()
        },
    )
    after = Inventory(
        {f"{id}.weight": (new * wide * 9, new * wide // 3) for id, _, new, wide, _ in layers()},
        {
            id: Operator("conv", new * wide * 9 * h * h, f"{id}.weight")
            for id, _, new, wide, h in layers()
        },
    )
    notes = [
        ("conv1.weight", "precision", "float", "sensitive", "0.8 points at 8 bits", method),
        ("conv1.weight", "structure", "kept", "protected", "reads the image", "filters"),
    ]
    return build(before, after, plan(method), notes)


def plan(method="int8"):
    """Cuts in the first convolution of every block and 8 bits everywhere but in conv1."""
    edits = [
        Remove(
            group=(Member(at=f"{id}.weight", dim=0, of=old, keep=tuple(range(new))),),
            by="filters",
        )
        for id, old, new, _, _ in layers()
        if new < old
    ]
    edits += [
        Bits(at=f"{id}.weight", role="weight", bits=8, signed=True, symmetric=True, axis=0,
             key=f"{id}.weight", by=method)
        for id, *_ in layers()
        if id != "conv1"
    ]  # fmt: skip
    return Plan(architecture=Architecture(name="sample_resnet20")).extended(edits)


def records():
    """Latencies that match the result, one prediction, the accuracy."""
    common = {
        "unit": "ms", "threads": 1, "batch": 1, "precision_hint": "f32", "n": 9, "load_avg": 0.41,
        "device": "Sample CPU, 2 cores", "shape": (1, 3, 32, 32), "seed": 0,
        "time": 1_767_225_600.0,
    }  # fmt: skip
    out = [
        Record("latency_ms", ms, median=ms * 1.01, iqr=ms * 0.06, p95=ms * 1.2, runtime=name,
               runtime_version="2026.1", subject={"model": side}, **common)
        for name, pair in (("openvino", (0.842, 0.349)), ("onnxruntime", (1.103, 0.587)))
        for side, ms in zip(("before", "after"), pair, strict=True)
    ]  # fmt: skip
    out.append(
        Record("speedup", 2.31, "ratio", kind="predicted", runtime="openvino",
               device="Sample CPU, 2 cores", time=1_767_225_600.0)
    )  # fmt: skip
    out.append(
        Record("top1", 0.9194, "share", n=10000, split="test", ci95=(0.9139, 0.9246), seed=0,
               time=1_767_225_600.0)
    )  # fmt: skip
    return out


def history():
    """Ten made-up epochs of 50 points."""
    rng = random.Random(0)
    x = [i / 50 for i in range(501)]
    loss = [0.35 + 1.2 * math.exp(-t / 1.5) + rng.gauss(0, 0.04) for t in x]
    return {
        "curves": {
            "train_loss": list(zip(x, loss, strict=True)),
            "loss/kd": [(t, 0.6 * v + 0.05) for t, v in zip(x, loss, strict=True)],
            "val_loss": [(e, 0.32 + 0.9 * math.exp(-e / 1.2)) for e in range(11)],
            "val_top1_cut": [(6, 0.6113)],
            "val_top1": [(e, 0.921 - 0.31 * math.exp(-e / 1.4)) for e in range(11)],
            "lr": [(t, round(0.05 * math.sin(math.pi * t / 10) ** 2, 6)) for t in x],
            "sparsity": [(e, 0.5 * (1 - (1 - min(e / 6, 1)) ** 3)) for e in range(11)],
            "temperature": [(e, None if e == 4 else 4 - 0.2 * e) for e in range(11)],
        }
    }


def recipe(method="int8"):
    """A recipe whose last method has any name one likes."""
    return f"""recipe: 1
seed: 0
goal: {{speedup: 2.5, size_mb: 0.3, max_drop: 1.0}}
train: {{epochs: 10, batch_size: 128, optimizer: {{class: SGD, lr: 0.05, momentum: 0.9}}}}
methods:
  filters: {{prune: gradual, weights: "re:layer[123].*conv1.weight", criterion: taylor}}
  "{method}": {{quantize: ptq, when: {{at: end}}}}
"""


def make_run(folder: Path, method="int8") -> Path:
    """Write all files of the sample run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result()))
    (folder / "recipe.yaml").write_text(recipe(method))
    (folder / "history.json").write_text(json.dumps(history()))
    plan(method).save(folder / "plan.json")
    ledger(method).save(folder / "ledger.json")
    RecordLog(folder / "records.jsonl").add(*records())
    return folder


def comparison_rows():
    """Three made-up recipes over three seeds."""
    rng = random.Random(2)
    return [
        {
            "recipe": name, "seed": seed, "top1": top1 + rng.gauss(0, 0.002),
            "drop": 100 * (0.9255 - top1) + rng.gauss(0, 0.2), "macs": macs, "bytes": size,
            "speedup": {"openvino": fast + rng.gauss(0, 0.05),
                        "onnxruntime": 0.8 * fast + rng.gauss(0, 0.05)},
        }
        for name, top1, fast, macs, size in (
            ("int8", 0.9241, 1.62, 40_551_040, 290_000),
            ("filters50+int8", 0.9194, 2.41, 21_840_128, 188_416),
            ("filters70+int8+kd", 0.9102, 3.05, 12_410_000, 121_000),
        )
        for seed in range(3)
    ]  # fmt: skip
