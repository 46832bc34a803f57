"""`gracile recipe convert`: a schedule of Distiller in, a recipe that loads out."""

import json

import pytest

from gracile.recipe import load, loads

OLD = """\
version: 1
pruners:
  agp:
    class: AutomatedGradualPruner
    initial_sparsity: 0.05
    final_sparsity: 0.7
    weights: [module.stem.weight]
  unused: {class: SensitivityPruner, sensitivities: {module.stem.weight: 0.5}}
policies:
- pruner: {instance_name: agp}
  starting_epoch: 0
  ending_epoch: 30
  frequency: 3
"""


@pytest.fixture
def old(place):
    (place / "old.yaml").write_text(OLD)
    return "old.yaml"


def test_the_recipe_goes_to_stdout_and_what_is_to_be_said_to_stderr(call, old):
    code, out, err = call("recipe", "convert", old)
    assert code == 0
    recipe = loads(out)
    assert recipe.train.epochs == 30
    assert recipe.train.batch_size == 256
    assert list(recipe.methods) == ["agp"]
    assert err == "warning unused: old.yaml:8: pruners.unused is used by no policy and left out.\n"


def test_what_distiller_takes_from_its_command_line_are_options(call, old):
    more = ["--epochs", "40", "--batch-size", "64", "--lr", "0.5", "--momentum", "0.8"]
    _, out, _ = call("recipe", "convert", old, *more, "--weight-decay", "0")
    train = loads(out).train
    assert (train.epochs, train.batch_size) == (40, 64)
    assert train.optimizer.arguments == {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.0}


def test_values_can_be_set_and_are_checked(call, old):
    sets = ["--set", "compat=strict", "--set", "prune.agp.sparsity.final=0.8"]
    _, out, _ = call("recipe", "convert", old, *sets)
    assert loads(out).compat == "strict"
    assert loads(out).methods["agp"].options.sparsity.final == 0.8
    code, out, err = call("recipe", "convert", old, "--set", "methods.agp.sparsity.final=8")
    assert (code, out) == (2, "")
    assert err.startswith("RecipeError: <converted>:10: prune.agp.sparsity.final must be in [0, 1)")
    code, _, err = call("recipe", "convert", old, "--set", "methods.apg.sparsity=0.5")
    assert code == 2
    assert "methods has no 'apg'. Nearest: 'agp'." in err


STRICT = """\
quantizers: {q: {class: QuantAwareTrainRangeLinearQuantizer, bits_activations: 8, bits_weights: 8}}
policies: [{quantizer: {instance_name: q}, starting_epoch: 0, ending_epoch: 2, frequency: 1}]
"""


def test_a_strict_recipe_is_another_one(call, place):
    (place / "qat.yaml").write_text(STRICT)
    found = {}
    for compat in ("none", "strict"):
        _, out, _ = call("recipe", "convert", "qat.yaml", "--set", f"compat={compat}")
        found[compat] = loads(out)
    assert [r.compat for r in found.values()] == ["none", "strict"]
    assert [r.methods["q"].options.symmetric for r in found.values()] == [True, False]
    code, _, err = call("recipe", "convert", "qat.yaml", "--set", "compat=strickt")
    assert code == 2
    assert "compat" in err


def test_it_is_written_to_a_file_and_told_as_json(call, as_json, old, place):
    _, shown, _ = call("recipe", "convert", old)
    code, out, _ = call("recipe", "convert", old, "--out", "new.yaml")
    assert (code, out) == (0, "new.yaml: 1 method(s)\n")
    assert (place / "new.yaml").read_text() == shown
    result = as_json("recipe", "convert", old, "--out", "new.yaml")
    assert result["out"] == "new.yaml"
    assert loads(json.dumps(result["recipe"])) == load(place / "new.yaml")
    assert [w["code"] for w in result["warnings"]] == ["unused"]
    assert as_json("recipe", "convert", old)["out"] is None


def test_the_converted_recipe_binds(call, old):
    call("recipe", "convert", old, "--out", "new.yaml")
    code, out, _ = call("recipe", "check", "new.yaml", "--model", "net.py:Net")
    assert (code, out) == (0, "new.yaml: ok, 1 method(s), binds to net.py:Net\n")


def test_a_wrong_schedule_is_a_users_error(call, old, place):
    (place / "bad.yaml").write_text(OLD.replace("instance_name: agp", "instance_name: apg"))
    code, out, err = call("recipe", "convert", "bad.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("RecipeError: bad.yaml:10: policies.0.pruner.instance_name must name")
    code, _, err = call("recipe", "convert", "nothing.yaml")
    assert code == 2
    assert err.startswith("RecipeError: nothing.yaml:1: no such recipe.")


def test_a_name_that_matches_nothing_is_refused_when_it_is_bound(call, old, place):
    (place / "far.yaml").write_text(OLD.replace("stem", "stam"))
    call("recipe", "convert", "far.yaml", "--out", "far_new.yaml")
    code, _, err = call("recipe", "check", "far_new.yaml", "--model", "net.py:Net")
    assert code == 2
    assert "'stam.weight' matches no tensor" in err
