"""What only shows when recipe, model and data meet: one message with place and way out, exit 2."""

import re

import pytest
import torch
from safetensors.torch import save_file

from gracile.cli.main import main

HEAD = "recipe: 1\ntrain: {epochs: 2, batch_size: 64}\nmethods:\n"
PRUNE = "prune: gradual, sparsity: 0.5"
CASES = {
    # selector without match
    "no-glob": (
        f'  m: {{{PRUNE}, weights: "layer9.*", when: {{at: 0ep}}}}', r"'layer9\.\*' matches"),
    "no-name": (
        f"  m: {{{PRUNE}, weights: layer1.0.conv9, when: {{at: 0ep}}}}", "Nearest: 'layer1"),
    "no-type": (f'  m: {{{PRUNE}, weights: "type:Conv3d", when: {{at: 0ep}}}}', "type:Conv3d"),
    "no-exclusion": (f'  m: {{{PRUNE}, weights: ["**", "!no.one"], when: {{at: 0ep}}}}', "no.one"),
    "all-excluded": (f'  m: {{{PRUNE}, weights: [conv1, "!*1"], when: {{at: 0ep}}}}', "subtracted"),
    # a method that never fires
    "too-late": (f"  m: {{{PRUNE}, weights: conv1, when: {{at: 2ep}}}}", "never fires"),
    "after-the-end": (f"  m: {{{PRUNE}, weights: conv1, when: {{start: 5ep}}}}", "never fires"),
    "steps-too-late": (f"  m: {{{PRUNE}, weights: conv1, when: {{at: 9999it}}}}", "never fires"),
    "span-too-late": ("  m: {distill: kd, when: {start: 3ep}}", "never fires"),
    # colliding edits
    "two-ptq": ("  m: {quantize: ptq}\n  n: {quantize: ptq}", r"'m' .* and 'n' .* both set bits"),
    "ptq-and-qat": ("  m: {quantize: ptq}\n  n: {quantize: qat, when: {start: 1ep}}", "keep one"),
    "two-qat": (
        "  m: {quantize: qat, when: {start: 1ep}}\n  n: {quantize: qat, when: {start: 0ep}}",
        "both set bits",
    ),
    # needs that cannot be met, structures that cannot be cut
    "at-for-a-span": ("  m: {distill: kd, when: {at: 1ep}}", r"write when: \{start: 1ep\}"),
    "half-a-stream": (
        f"  m: {{{PRUNE}, granularity: filter, weights: conv1, when: {{at: 0ep}}}}",
        "shares its channels",
    ),
    "filters-of-the-head": (
        f"  m: {{{PRUNE}, granularity: filter, weights: linear, when: {{at: 0ep}}}}",
        "can lose filters",
    ),
    "freeze-too-late": (
        "  m: {quantize: qat, when: {start: 1ep}, freeze_observers: 7ep}",
        "not before the end",
    ),
    # names that only now can be known to be wrong
    "after-nobody": ("  m: {quantize: ptq, after: first}", "after must name an entry before it"),
    "no-such-profile": ("  m: {quantize: ptq, profile: tpu}", "no quantization profile 'tpu'"),
}  # fmt: skip
ENTRY = f"methods:\n  m: {{{PRUNE}, weights: conv1, when: {{at: 0ep}}}}\n"
HEADS = {
    # what a method needs is not there: no training
    "kd-without-training": (
        "train: {epochs: 0}\nmethods:\n  m: {distill: kd}\n",
        r"r\.yaml:4: 'm' \(distill: kd\) acts during training, but train.epochs is 0; set train:",
    ),
    "qat-without-training": (
        "train: {epochs: 0}\nmethods:\n  m: {quantize: qat, when: {start: 0ep}}\n",
        r"r\.yaml:4: 'm' \(quantize: qat\) acts during training",
    ),
    "pruning-without-training": (
        "train: {epochs: 0}\n" + ENTRY,
        r"r\.yaml:4: 'm': when {at: 0ep} never fires: there is no training .*; write {at: end}",
    ),
    # values that the data or the length of training refuse
    "rows-that-are-not-there": (
        'data:\n  calibration: 50\n  train: "train[:30000]"\n' + ENTRY,
        r"r\.yaml:4: data\.train: 'train\[:30000\]' is out of range: train has 1437 rows",
    ),
    "more-validation-than-data": (
        "data: {val: 5000}\n" + ENTRY,
        r"r\.yaml:2: data\.val: cannot cut 5000 from 1437 training rows",
    ),
    "rows-used-twice": (
        'data: {train: "train[:100]", val: "train[50:200]"}\n' + ENTRY,
        r"r\.yaml:2: data\.val .* and data\.train .* share 50 rows",
    ),
    "no-such-split": ('data: {val: "val[:10]"}\n' + ENTRY, r"r\.yaml:2: data\.val: .*no val split"),
    "a-schedule-that-ends-too-early": (
        "train: {epochs: 2, lr: {class: OneCycleLR, max_lr: 0.1, total_steps: 3}}\n" + ENTRY,
        r"r\.yaml:2: train\.lr: OneCycleLR ends after 3 steps, training has 22; leave",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message_with_place_and_nothing_written(name, tmp_path, capsys):
    entry, expected = CASES[name]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(HEAD + entry + "\n")
    out = tmp_path / "out"
    arguments = ["--data", "digits", "--recipe", str(recipe), "--out", str(out)]
    assert main(["compress", "resnet20_cifar_a", *arguments]) == 2
    errors = capsys.readouterr().err
    assert re.search(expected, errors), errors
    line = recipe.read_text().splitlines().index(entry.splitlines()[-1]) + 1
    place = re.escape(f"{recipe}:{line}: '")
    assert re.match(rf"(?:Bind|User)Error: {place}|PlanConflict: {place}", errors), errors
    assert errors.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("name", HEADS)
def test_what_the_data_and_the_training_length_refuse(name, tmp_path, capsys):
    text, expected = HEADS[name]
    recipe = tmp_path / "r.yaml"
    recipe.write_text("recipe: 1\n" + text)
    arguments = ["--data", "digits", "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    assert main(["compress", "resnet20_cifar_a", *arguments]) == 2
    errors = capsys.readouterr().err
    assert re.search(expected, errors), errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no-name", "too-late", "two-ptq"])
def test_recipe_check_with_a_model_finds_the_same(name, tmp_path, capsys):
    entry, expected = CASES[name]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(HEAD + entry + "\n")
    assert main(["recipe", "check", str(recipe)]) == 0
    assert main(["recipe", "check", str(recipe), "--model", "resnet20_cifar_a"]) == 2
    assert re.search(expected, capsys.readouterr().err)


GOOD = HEAD + f"  m: {{{PRUNE}, weights: conv1, when: {{at: 0ep}}}}\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "resnet20_cifar_b"}, "Nearest: 'resnet20_cifar_a'"),
        ({"model": "nofile.py:make"}, "nofile.py"),
        ({"--weights": "missing.safetensors"}, "missing.safetensors"),
        ({"--data": "digitz"}, "Nearest: 'digits'"),
        ({"--data": "parquet:/no/such/folder"}, "/no/such/folder"),
        ({"--recipe": "missing.yaml"}, "missing.yaml"),
        ({"--device": "tpu"}, "--device must be cpu or cuda:i"),
        (
            {"--runtime": "tensorrt"},
            "unknown runtime 'tensorrt'. Known: executorch, litert, ncnn, onnxruntime",
        ),
        ({"--runtime": "openvino:TPU"}, "OpenVINO here has no device 'TPU'; it has CPU"),
        ({"--runtime": "pytorch:tpu"}, "PyTorch here cannot use device 'tpu'"),
        (
            {"--weights": "other.safetensors"},
            "does not fit CifarResNet: 97 missing",
        ),
        ({"--set": "train"}, "must be key.key=value. Write train.epochs=3"),
        ({"--set": "train.epoch=3"}, "epochs"),
        ({"--set": "train.epochs=-3"}, "-3"),
        ({"--hint": "fp8"}, "fp8"),
        ({"--threads": "0"}, "--threads"),
    ],
    ids=lambda v: str(v),
)
def test_bad_arguments_are_refused_before_anything_is_written(
    change, expected, tmp_path, capsys, monkeypatch
):
    (tmp_path / "r.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    save_file({"fc.weight": torch.zeros(10, 64)}, "other.safetensors")
    out = tmp_path / "out"
    arguments = {
        "--data": "digits",
        "--recipe": str(tmp_path / "r.yaml"),
        "--out": str(out),
        **{k: v for k, v in change.items() if k.startswith("--")},
    }
    model = change.get("model", "resnet20_cifar_a")
    assert main(["compress", model, *(x for pair in arguments.items() for x in pair)]) == 2
    errors = capsys.readouterr().err
    assert expected in errors
    assert "Traceback" not in errors
    assert not out.exists()
