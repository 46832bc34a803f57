import importlib.util
from pathlib import Path

import pytest
import torch

from gracile import Plan
from gracile.benchmark.artifact import open_artifact
from gracile.recipe.load import load

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = EXAMPLES / "own_loop.py"
RECIPE = EXAMPLES / "own_loop.yaml"
MARK = "# gracile"


def module(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_gracile_takes_at_most_12_lines():
    marked = [line for line in SOURCE.read_text().splitlines() if line.endswith(MARK)]
    assert 0 < len(marked) <= 12
    rest = [line for line in SOURCE.read_text().splitlines() if not line.endswith(MARK)]
    code = "\n".join(rest).split('"""', 2)[2]
    assert "gracile" not in code
    assert "session" not in code


def test_without_those_lines_it_is_a_script_that_trains(tmp_path):
    plain = tmp_path / "plain.py"
    lines = SOURCE.read_text().splitlines(keepends=True)
    plain.write_text("".join(line for line in lines if not line.rstrip().endswith(MARK)))
    assert module(plain).main(["--epochs", "2"]) > 0.3


def test_with_them_it_prunes_cuts_quantizes_and_exports(tmp_path):
    arguments = ["--recipe", str(RECIPE), "--out", str(tmp_path), "--epochs", "3"]
    arguments += ["--runtime", "onnxruntime", "--runtime", "openvino:CPU"]
    assert module(SOURCE).main(arguments) > 0.3
    plan = Plan.load(tmp_path / "plan.json")
    assert len(plan.of_kind("remove")) == 2
    assert plan.of_kind("bits")
    for runtime in ("onnxruntime", "openvino"):
        (path,) = (
            p for p in (tmp_path / "export" / runtime).iterdir() if p.suffix in (".onnx", ".xml")
        )
        assert open_artifact(path).precision == "int8"


def test_overrides_reach_the_recipe(tmp_path):
    arguments = ["--recipe", str(RECIPE), "--out", str(tmp_path), "--epochs", "3"]
    module(SOURCE).main([*arguments, "--set", "methods.filters.sparsity.final=0.25"])
    removed = Plan.load(tmp_path / "plan.json").of_kind("remove")
    kept = [len(part.keep) for edit in removed for part in edit.group]
    assert set(kept) == {24}


def test_the_loop_follows_a_model_that_is_replaced_in_training(tmp_path):
    recipe = tmp_path / "qat.yaml"
    recipe.write_text(
        "recipe: 1\nmethods: {int8: {quantize: qat, when: {start: 0ep}}}\n", encoding="utf-8"
    )
    arguments = ["--recipe", str(recipe), "--out", str(tmp_path), "--epochs", "1"]
    module(SOURCE).main(arguments)
    roles = {e.role for e in Plan.load(tmp_path / "plan.json").of_kind("bits")}
    assert roles >= {"weight", "output"}


def test_its_recipe_brings_no_training_of_its_own():
    assert load(RECIPE).train.epochs == 0


def test_the_library_example_returns_records(tmp_path):
    records = module(EXAMPLES / "library.py").main(["--epochs", "1", "--out", str(tmp_path)])
    speedup = [r for r in records if r.metric == "speedup"]
    assert [r.subject["model"] for r in speedup] == ["small"]
    assert open_artifact(tmp_path / "small" / "model.onnx").precision == "int8"
    assert open_artifact(tmp_path / "dense" / "model.onnx").precision == "f32"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
