import pytest

from gracile.errors import RecipeError
from gracile.recipe import loads
from gracile.recipe.patch import with_overrides

pytestmark = pytest.mark.usefixtures("toy_methods")

WEIGHTS = '["type:Conv2d", "!conv1.weight"]'


@pytest.mark.parametrize(
    ("override", "old", "new"),
    [
        ("train.epochs=5", "epochs: 3", "epochs: 5"),
        ("seed=8", "seed: 7", "seed: 8"),
        ("goal.max_drop=null", ", max_drop: 1.0", ""),
        ("train.optimizer.lr=1e-6", "lr: 0.05", "lr: 1e-6"),
        ("train.optimizer={class: Adam, lr: 1e-3}", None, None),
        ("train.lr.pct_start=0.1", "max_lr: 0.1", "max_lr: 0.1, pct_start: 0.1"),
        ("methods.filters.sparsity.final=0.6", "final: 0.5", "final: 0.6"),
        ("prune.filters.sparsity.final=0.6", "final: 0.5", "final: 0.6"),
        ("methods.filters.when.every=10it", "every: 50it", "every: 10it"),
        ("methods.filters.criterion=flat", "{name: power, p: 3}", "flat"),
        ('methods.filters.weights="!fc"', WEIGHTS, '"!fc"'),
        ("methods.filters.weights=[a, type:Linear]", WEIGHTS, "[a, type:Linear]"),
        ("methods.thin=null", "  thin: {prune: cut, when: {at: 2ep}}\n", ""),
        ("methods.thin.when={at: end}", "at: 2ep", "at: end"),
        ("quantize.int8.bits=4", "quantize: grid", "quantize: grid, bits: 4"),
        (" train.epochs = 5", "epochs: 3", "epochs: 5"),
        ("train.clip_grad_norm=2.0", "epochs: 3", "epochs: 3\n  clip_grad_norm: 2.0"),
    ],
)  # fmt: skip
def test_setting_a_value_is_as_writing_it(valid, override, old, new):
    got = with_overrides(loads(valid), [override])
    if old is None:
        assert got.train.optimizer.arguments == {"lr": 1e-3}
    else:
        assert got == loads(valid.replace(old, new))
        assert got != loads(valid)


def test_an_entry_can_be_added_at_the_end(valid):
    got = with_overrides(valid, ["methods.last={prune: cut, when: {at: end}}"])
    assert list(got.methods) == ["filters", "thin", "int8", "last"]


def test_several_are_set_in_order_and_checked_once(valid):
    got = with_overrides(valid, ["train.lr=null", "train.lr.class=StepLR", "train.lr.step_size=2"])
    assert got.train.lr == {"class": "StepLR", "step_size": 2}
    assert with_overrides(valid, ["seed=1", "seed=2"]).seed == 2
    assert with_overrides(loads("recipe: 1"), ["goal.speedup=2"]).goal.speedup == 2.0


def test_the_recipe_given_is_not_changed(valid):
    recipe = loads(valid, "r.yaml")
    before = recipe.to_yaml()
    got = with_overrides(recipe, ["methods.filters.sparsity.final=0.6"])
    assert recipe.to_yaml() == before
    assert got.path == "r.yaml"
    assert got.lines == recipe.lines
    assert with_overrides(recipe, []) == recipe


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epochs", "must be key.key=value. Write train.epochs=3."),
        ("train.epochs=", "must be key.key=value"),
        ("=3", "must be key.key=value"),
        ("train..epochs=3", "must be key.key=value"),
        ("tran.epochs=3", "the recipe has no 'tran'. Nearest: 'train'."),
        ("quantize.filters.bits=3", "the recipe has no 'quantize'."),
        ("train.epoch=3", "train has no key 'epoch'. Nearest: 'epochs'."),
        ("train.opt.lr=1", "train has no key 'opt'."),
        ("train.epochs=-3", "train.epochs must be in [0, 1000000], got -3."),
        ("train.epochs.x=3", "train.epochs is 3, which has no 'x'. Set it as a whole"),
        ("data.mean.0=3", "data.mean is [0.5, 0.4, 0.3], which has no '0'. Set it as a whole"),
        ("methods.filtr.sparsity=0.1", "methods has no 'filtr'. Nearest: 'filters'."),
        ("methods.thn=null", "methods has no 'thn'. Nearest: 'thin'."),
        ("methods.filters.sparsty=0.1", "prune.filters has no key 'sparsty'. Nearest: 'sparsity'."),
        ("prune.filters.sparsity=1.2", "prune.filters.sparsity must be in [0, 1), got 1.2."),
        ("methods.filters.weights=*.w", "the value is not YAML: while scanning an alias"),
        ("methods.filters.weights=!fc", "the value is tags are not allowed"),
        ("seed=!!python/name:os.system", "the value is tags are not allowed"),
        ("seed=.nan", "a number must be finite"),
        ("recipe=2", "recipe must be 1, got 2."),
        ("methods=3", "methods must be a mapping, got 3."),
    ],
)
def test_a_wrong_override_names_itself_and_the_way_out(valid, override, says):
    with pytest.raises(RecipeError) as caught:
        with_overrides(loads(valid, "r.yaml"), [override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert says in str(caught.value)


def test_a_fault_elsewhere_keeps_its_line(valid):
    with pytest.raises(RecipeError, match=r"^r\.yaml:9: data\.std must be as long as mean \(3\)"):
        loads(valid.replace("[1, 1, 1]", "[1, 1]"), "r.yaml")
    with pytest.raises(RecipeError, match=r"^--set data\.mean=\[1, 1\]: |^r\.yaml:9: data\.std"):
        with_overrides(loads(valid, "r.yaml"), ["data.mean=[1, 1]"])
