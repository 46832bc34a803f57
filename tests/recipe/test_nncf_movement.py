"""Movement sparsity of NNCF: its warm-up, its structures, and a run that cuts heads and units."""

import json
import warnings

import pytest
import torch
from nncf_case import Encoder, Net, converted, entry, loaded
from torch.nn import functional as F

from gracile.compat.nncf import create_compression_algorithm
from gracile.core.schedule import Calendar
from gracile.errors import RecipeError
from gracile.recipe.explain import timetable_rows
from gracile.recipe.nncf import convert
from gracile.train.session import Session

STEPS = 4
MODEL = Encoder()
PARAMS = {
    "warmup_start_epoch": 1,
    "warmup_end_epoch": 3,
    "importance_regularization_factor": 0.02,
}
STRUCTURES = [
    {"mode": "block", "sparse_factors": [2, 4], "target_scopes": "{re}Attention"},
    {"mode": "per_dim", "axis": 0, "target_scopes": "{re}up"},
    {"mode": "per_dim", "axis": 1, "target_scopes": ["{re}down"]},
]
IGNORED = ["{re}classifier", "{re}norm"]


def movement(params=(), **more):
    return {
        "algorithm": "movement_sparsity",
        "params": {**PARAMS, **dict(params)},
        "ignored_scopes": IGNORED,
        **more,
    }


def batches():
    g = torch.Generator().manual_seed(0)
    ys = [torch.randint(4, (16,), generator=g) for _ in range(STEPS)]
    return [(torch.randn(16, 5, 8, generator=g) + y[:, None, None], y) for y in ys]


def test_the_whole_entry():
    recipe, _ = converted(
        movement(sparse_structure_by_scopes=STRUCTURES), model=MODEL, epochs=5,
        optimizer={"type": "Adam", "base_lr": 0.01},
    )  # fmt: skip
    assert recipe["methods"] == {
        "movement_sparsity": {
            "prune": "movement",
            "weights": ["type:Linear", "!classifier"],
            "parts": [
                {
                    "weights": [f"attention.{n}" for n in "qkvo"],
                    "granularity": {"name": "block", "filters": 2, "channels": 4},
                },
                {"weights": ["up"], "granularity": "row"},
                {"weights": ["down"], "granularity": "column"},
            ],
            "threshold": {"ramp": "cubic", "initial": 0.0, "final": 0.0},
            "initial_sparsity": 0.001,
            "strength": {"ramp": "cubic", "final": 0.02},
            "loss": "nncf",
            "score_optimizer": "adam",
            "score_lr": 0.01,
            "when": {"start": "1ep", "stop": "3ep", "every": "1it"},
            "freeze": "3ep",
            "structured": True,
        },
        "movement_sparsity-thin": {"prune": "thin", "when": {"at": "end"}},
    }


@pytest.mark.parametrize("power", [1.0, 3, 0.5])
def test_threshold_and_factor_follow_nncfs_polynomial(power):
    steps, first = 50, -0.3
    params = {"power": power, "init_importance_threshold": first}
    recipe = loaded(movement(params), model=MODEL, epochs=5)
    rows = [r for r in timetable_rows(recipe, Calendar(5, steps)) if r.id == "movement_sparsity"]
    assert (rows[0].epoch, rows[0].batch, len(rows)) == (1, 0, 2 * steps)
    for k, row in enumerate(rows):
        way = 1 - (1 - k / (2 * steps - 1)) ** power  # NNCF divides by 2 * steps, one step more
        assert row.levels["threshold"] == pytest.approx(first * (1 - way))
        assert row.levels["strength"] == pytest.approx(0.02 * way)


def test_without_structured_masking_masks_only_freeze():
    recipe, _ = converted(movement({"enable_structured_masking": False}), model=MODEL, epochs=5)
    assert [*recipe["methods"]] == ["movement_sparsity"]
    found = recipe["methods"]["movement_sparsity"]
    assert found["freeze"] == "3ep"
    assert "structured" not in found
    assert "parts" not in found


def test_training_goes_on_for_an_epoch_after_the_warm_up():
    assert converted(movement({"warmup_end_epoch": 2.5}), model=MODEL)[0]["train"]["epochs"] == 4
    found = entry(movement({"warmup_end_epoch": 2.5}), model=MODEL)
    assert found["freeze"] == found["when"]["stop"] == "2.5ep"


def test_a_warm_up_to_the_end_is_told_and_freezes_there():
    recipe, told = converted(movement(), model=MODEL, epochs=3)
    assert [*recipe["methods"]] == ["movement_sparsity"]
    assert not {"freeze", "structured"} & recipe["methods"]["movement_sparsity"].keys()
    assert any("warmup_end_epoch is not before the end of training, 3" in w for w in told)


def test_what_is_different_is_told():
    _, told = converted(movement(), model=MODEL, epochs=5)
    for text in ("scores biases as well", "score_lr is 0.01"):
        assert sum(text in w for w in told) == 1
    falling = movement({"init_importance_threshold": 0.5})
    assert any("less and less" in w for w in converted(falling, model=MODEL, epochs=5)[1])
    sgd = {"type": "SGD", "base_lr": 0.1}
    found = entry(movement(compression_lr_multiplier=2), model=MODEL, epochs=5, optimizer=sgd)
    assert (found["score_optimizer"], found["score_lr"]) == ("sgd", 0.2)


def test_only_linear_layers_that_are_asked_for_get_a_structure():
    rows = {"mode": "per_dim", "axis": 0, "target_scopes": "{re}.*"}
    found = entry(movement(sparse_structure_by_scopes=[rows]), model=MODEL, epochs=5)
    wanted = [*(f"attention.{n}" for n in "qkvo"), "up", "down"]
    assert found["parts"] == [{"weights": wanted, "granularity": "row"}]
    few = movement(sparse_structure_by_scopes=[rows], target_scopes=["{re}up", "{re}down"])
    assert entry(few, model=MODEL, epochs=5)["parts"][0]["weights"] == ["up", "down"]
    fine = {"mode": "fine", "sparse_factors": [1, 1], "target_scopes": "{re}.*"}
    assert "parts" not in entry(movement(sparse_structure_by_scopes=[fine]), model=MODEL)
    none = {"mode": "per_dim", "axis": 0, "target_scopes": "{re}classifier"}
    _, told = converted(movement(sparse_structure_by_scopes=[none]), model=MODEL)
    assert any("means no linear layer that is to be sparse" in w for w in told)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"mode": "block"}, "needs sparse_factors, such as"),
        ({"mode": "block", "sparse_factors": [2]}, "sparse_factors must be two numbers"),
        ({"mode": "block", "sparse_factors": [2, 2], "axis": 0}, "has no axis, as its mode is bl"),
        ({"mode": "per_dim"}, "needs axis, 0"),
        ({"mode": "per_dim", "axis": 2}, "axis must be"),
        ({"mode": "fine", "sparse_factors": [2, 2]}, "has no sparse_factors"),
        ({"mode": "fine"}, None),
    ],
)
def test_structures_are_checked_where_they_are_written(structure, message):
    algorithm = movement(sparse_structure_by_scopes=[{**structure, "target_scopes": "{re}up"}])
    text = json.dumps({"compression": algorithm}).replace('"sparse_str', '\n"sparse_str')
    if message is None:
        convert(text, name="c", model_names=MODEL)
        return
    with pytest.raises(RecipeError, match=f"^c:2: .*{message}"):
        convert(text, name="c", model_names=MODEL)


def test_two_structures_for_one_layer_and_a_model_without_linear_layers_are_refused():
    twice = [STRUCTURES[1], {**STRUCTURES[2], "target_scopes": "{re}(up|down)"}]
    with pytest.raises(RecipeError, match="means 'up', which has another structure already"):
        converted(movement(sparse_structure_by_scopes=twice), model=MODEL)
    with pytest.raises(RecipeError, match="acts on linear layers, and the model has none"):
        converted({**movement(), "ignored_scopes": []}, model=Net().layer1)


def test_a_file_ends_in_fewer_heads_and_units():
    torch.manual_seed(0)
    model = Encoder()
    # heads 0 and 1 and units 0 to 2 begin at zero: they do not move, and the loss takes them
    with torch.no_grad():
        for n in "qkv":
            getattr(model.attention, n).weight[:4] = 0
        model.attention.v.bias[:4], model.up.bias[:3] = 0, 0
        model.attention.o.weight[:, :4] = 0
        model.up.weight[:3] = 0
        model.down.weight[:, :3] = 0
    recipe = loaded(
        movement(
            {"importance_regularization_factor": 1e-4},
            sparse_structure_by_scopes=STRUCTURES,
        ),
        model=model, epochs=5, optimizer={"type": "Adam", "base_lr": 0.01},
    )  # fmt: skip
    data = batches()
    s = Session(
        model, recipe, torch.optim.Adam(model.parameters(), lr=1e-4), example=data[0][0],
        steps_per_epoch=STEPS,
    )  # fmt: skip
    for _ in range(5):
        with s.epoch():
            for x, y in data:
                s.model.train()
                s.loss(F.cross_entropy(s.model(x), y)).backward()
                s.step()
    trained = s.model.eval()(data[0][0])
    result = s.finish()
    shapes = {n: tuple(p.shape) for n, p in result.model.named_parameters()}
    assert shapes["attention.q.weight"][0] == shapes["attention.o.weight"][1] < 8
    assert shapes["up.weight"][0] == shapes["down.weight"][1] < 6
    torch.testing.assert_close(result.model(data[0][0]), trained, atol=1e-5, rtol=1e-4)


def test_a_script_trains_scores_as_well():
    torch.manual_seed(0)
    config = {
        "input_info": {"sample_size": [2, 5, 8]},
        "epochs": 4,
        "compression": movement(
            {"enable_structured_masking": False, "importance_regularization_factor": 1.0}
        ),
    }
    data = batches()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        algorithm = create_compression_algorithm(Encoder(), config)
    assert any("scores biases as well" in str(w.message) for w in told)
    model = algorithm.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    algorithm.initialize(data)
    for _ in range(4):
        for x, y in data:
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + algorithm.loss()).backward()
            optimizer.step()
            algorithm.scheduler.step()
        algorithm.scheduler.epoch_step()
    zeros = algorithm.statistics()["sparsity"]
    assert 0.3 < zeros["attention.q.weight"] <= 0.98
    assert zeros["classifier.weight"] == 0
