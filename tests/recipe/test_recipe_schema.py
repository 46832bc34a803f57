import inspect
import subprocess
import sys

import pytest
import torch

from gracile.core.schedule import Time, When
from gracile.errors import RecipeError
from gracile.recipe import Recipe, load, loads
from gracile.recipe.optimizers import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("toy_methods")


def test_a_full_recipe_reads_as_written(valid):
    r = loads(valid, "r.yaml")
    assert (r.recipe, r.seed, r.path) == (1, 7, "r.yaml")
    assert (r.goal.speedup, r.goal.max_drop, r.goal.latency_ms) == (2.5, 1.0, None)
    assert r.train.optimizer.class_ == "SGD"
    assert r.train.optimizer.arguments == {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    assert r.train.lr == {"class": "OneCycleLR", "max_lr": 0.1}
    assert r.data.val == "test[5000:]"
    assert r.data.std == (1.0, 1.0, 1.0)
    assert list(r.methods) == ["filters", "thin", "int8"]
    filters = r.methods["filters"]
    assert (filters.verb, filters.method) == ("prune", "fade")
    assert filters.options.weights == ("type:Conv2d", "!conv1.weight")
    assert filters.options.timing == When(start="0ep", stop="2ep", every="50it")
    assert filters.options.sparsity.at(1.0) == 0.5
    assert r.methods["thin"].options.when.at == Time.parse("2ep")
    assert r.lines == {"filters": 11, "thin": 17, "int8": 18}


def test_the_smallest_recipe_and_its_defaults():
    r = loads("recipe: 1")
    assert (r.seed, r.train.epochs, r.train.batch_size, r.train.augment) == (0, 0, 128, "auto")
    assert (r.data.val, r.data.calibration, r.methods, r.lines) == ("auto", 300, {}, {})
    assert r.train.optimizer.arguments["lr"] == 0.01
    assert loads(r.to_yaml()) == r


def test_saving_fills_defaults_in_a_stable_order(valid, tmp_path):
    r = loads(valid)
    r.save(tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    again = load(tmp_path / "recipe.yaml")
    assert again == r
    assert again.to_yaml() == text
    assert list(r.plain()) == ["recipe", "seed", "goal", "train", "data", "methods"]
    assert "label_smoothing: 0.0" in text
    assert "multiple_of: 1" in text
    assert "null" not in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_null_that_is_not_the_default_is_kept(valid):
    r = loads(valid.replace("{quantize: grid, when: {at: end}}", "{quantize: grid, when: null}"))
    assert r.methods["int8"].options.timing is None
    assert "when" not in r.plain()["methods"]["int8"]
    assert loads(r.to_yaml()) == r


def test_equality_and_hash_look_at_what_is_said_only(valid):
    one = loads(valid, "a.yaml")
    two = loads("# comment\n\n" + valid.replace("seed: 7", "seed:   7 # here"), "b.yaml")
    assert one == two
    assert one.sha == two.sha
    assert hash(one) == hash(two)
    assert one.lines != two.lines
    assert one != "something else"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 7", "seed: 8"),
        ("final: 0.5", "final: 0.51"),
        ("p: 3", "p: 4"),
        ("max_lr: 0.1", "max_lr: 0.2"),
        ("momentum: 0.9", "momentum: 0.8"),
        ("at: 2ep", "at: 1ep"),
        ("  thin:", "  cut:"),
    ],
)
def test_saying_something_else_changes_the_hash(valid, old, new):
    one, two = loads(valid), loads(valid.replace(old, new))
    assert one != two
    assert one.sha != two.sha


def test_order_of_methods_counts_and_order_of_keys_does_not():
    a, b = "a: {prune: cut, when: {at: end}}", "b: {prune: cut, when: {at: end}}"
    one = loads(f"recipe: 1\nmethods:\n  {a}\n  {b}\n")
    two = loads(f"methods:\n  {b}\n  {a}\nrecipe: 1\n")
    assert one.sha != two.sha
    head = "train: {optimizer: {class: SGD, lr: 0.1, %s}}\nrecipe: 1"
    three = loads(head % "momentum: 0.9, nesterov: true")
    four = loads(head % "nesterov: true, momentum: 0.9")
    assert three.sha == four.sha
    assert three == four


def test_writing_a_default_out_changes_nothing(valid):
    text = valid.replace("prune: fade", "prune: fade\n    scope: layer")
    assert loads(text).sha == loads(valid).sha


def test_a_recipe_is_frozen(valid):
    r = loads(valid)
    with pytest.raises(ValueError, match="frozen"):
        r.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        r.train.epochs = 3


def test_bytes_and_text_are_the_same_recipe(valid):
    assert loads(valid.encode()) == loads(b"\xef\xbb\xbf" + valid.encode()) == loads(valid)


def test_reading_a_recipe_without_methods_imports_no_torch():
    code = (
        "import sys; from gracile.recipe import loads; "
        "loads('{recipe: 1, train: {epochs: 2, lr: {class: OneCycleLR}}}').to_yaml(); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()


def test_every_listed_optimizer_argument_exists_in_torch():
    for name, arguments in OPTIMIZERS.items():
        known = inspect.signature(getattr(torch.optim, name)).parameters
        assert set(arguments) <= set(known), name


EXAMPLES = {
    "SGD": "momentum: 0.9, nesterov: true, weight_decay: 5e-4",
    "Adam": "betas: [0.8, 0.99], eps: 1e-7, amsgrad: true",
    "AdamW": "weight_decay: 0.05",
    "NAdam": "momentum_decay: 0.004, decoupled_weight_decay: true",
    "RAdam": "decoupled_weight_decay: true",
    "Adamax": "betas: [0.9, 0.95]",
    "Adagrad": "lr_decay: 0.1, initial_accumulator_value: 0.1",
    "Adadelta": "rho: 0.8",
    "RMSprop": "alpha: 0.9, momentum: 0.9, centered: true",
    "ASGD": "lambd: 1e-3, t0: 10",
    "Rprop": "etas: [0.4, 1.3], step_sizes: [1e-5, 10]",
    "Adafactor": "beta2_decay: -0.7, eps: [null, 1e-3], d: 1.5",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_list_can_be_made(name):
    r = loads(f"recipe: 1\ntrain: {{optimizer: {{class: {name}, lr: 1e-2, {EXAMPLES[name]}}}}}")
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = getattr(torch.optim, name)([weight], **r.train.optimizer.arguments)
    weight.sum().backward()
    optimizer.step()
    assert not torch.equal(weight.detach(), torch.ones(2, 2))
    assert loads(r.to_yaml()) == r


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "__import__", "os.system"])
def test_no_other_name_of_torch_optim_can_be_reached(name):
    with pytest.raises(RecipeError, match=r"optimizer\.class must be an optimizer"):
        loads(f"recipe: 1\ntrain: {{optimizer: {{class: {name}, lr: 0.1}}}}")


def test_the_mapping_form_can_be_dumped_by_pydantic_too(valid):
    dumped = loads(valid).model_dump()
    assert dumped["methods"]["thin"] == {"prune": "cut", "when": {"at": "2ep"}}
    assert dumped["data"]["calibration"] == 300
    assert Recipe.model_validate(dumped).methods["thin"] == loads(valid).methods["thin"]
