import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.core.schedule import Time, When
from gracile.errors import RecipeError
from gracile.recipe import Recipe, loads
from gracile.recipe.build import (
    distill,
    factorize,
    method,
    prune,
    quantize,
    recover,
    regularize,
)
from gracile.recipe.document import unprintable
from gracile.recipe.fields import kernel, read_level

pytestmark = pytest.mark.usefixtures("toy_methods")


def test_python_and_yaml_say_the_same(valid):
    built = Recipe.build(
        seed=7,
        goal={"speedup": 2.5, "max_drop": 1},
        train={
            "epochs": 3,
            "batch_size": 64,
            "optimizer": {"class": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
            "lr": {"class": "OneCycleLR", "max_lr": 0.1},
        },
        data={"val": "test[5000:]", "mean": (0.5, 0.4, 0.3), "std": (1, 1, 1)},
        methods={
            "filters": prune(
                "fade",
                weights=["type:Conv2d", "!conv1.weight"],
                criterion={"name": "power", "p": 3},
                sparsity={"ramp": "cubic", "initial": 0.05, "final": 0.5},
                when={"start": "0ep", "stop": "2ep", "every": "50it"},
            ),
            "thin": prune("cut", when={"at": "2ep"}),
            "int8": quantize("grid", when={"at": "end"}),
        },
    )
    assert built == loads(valid)
    assert built.sha == loads(valid).sha
    assert built.path == "<python>"
    assert built.lines == {}


def test_objects_stand_for_what_they_hold():
    level = read_level({"ramp": "linear", "final": 0.5})
    one = Recipe.build(
        methods={
            "a": prune(
                "fade",
                weights=("a", "b"),
                sparsity=level,
                criterion=kernel("criterion", "power", p=3),
                when=When(start="0ep", every="1ep"),
            ),
            "b": prune("cut", when={"at": Time.parse("2ep")}),
        }
    )
    assert one.methods["a"].options.sparsity == level
    assert loads(one.to_yaml()) == one
    assert Recipe.build(methods=one.methods) == one


def test_every_verb_has_its_function():
    made = [prune, quantize, distill, regularize, factorize, recover]
    assert [f("x", name=1) for f in made] == [method(f.__name__, "x", name=1) for f in made]
    assert prune("fade", weights="**") == {"prune": "fade", "weights": "**"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"methods": {"filters": prune("fade", weights="**", sparsity=1.2, when={"at": "end"})}},
            r"<python>: prune\.filters\.sparsity must be in \[0, 1\), got 1\.2\. For 20 % write 0",
        ),
        ({"train": {"epocs": 3}}, r"<python>: train has no key 'epocs'\. Nearest: 'epochs'\."),
        ({"train": {"epochs": 3.5}}, r"<python>: train\.epochs must be a whole number, got 3\.5"),
        ({"seed": -1}, r"<python>: seed must be at least 0"),
        ({"train": {"optimizer": print}}, r"train\.optimizer must be plain data .*got <built-in"),
        ({"goal": {"speedup": float("nan")}}, r"goal\.speedup must be a finite number, got nan"),
        ({"seed": 2**64}, r"seed must be a whole number of 64 bits"),
        ({"goal": {3: 1}}, r"goal must have texts as keys, got 3"),
        ({"data": {"val": "te\x00st"}}, r"data\.val must be printable text"),
        ({"methods": {"a": prune("cut", when=[print])}}, r"prune\.a\.when\.0 must be plain data"),
        ({"methods": [1]}, r"<python>: methods must be a mapping, got \[1\]"),
    ],
    ids=str,
)
def test_faults_are_told_as_for_a_file(sections, message):
    with pytest.raises(RecipeError, match="^" + message if message[0] == "<" else message):
        Recipe.build(**sections)


shares = st.floats(0, 0.99)
levels = st.one_of(
    shares,
    st.fixed_dictionaries(
        {"ramp": st.sampled_from(["cubic", "linear", "constant"]), "final": shares},
        optional={"initial": shares},
    ),
)
spans = st.builds(
    lambda at, n, unit: {"at": at} if at else {"start": "0ep", "every": f"{n}{unit}"},
    st.sampled_from([None, "end", "2ep", "0.5ep", "30it"]),
    st.integers(1, 99),
    st.sampled_from(["ep", "it", "mb"]),
)
patterns = st.one_of(
    st.sampled_from(["**", "type:Conv2d", "re:layer[12].*", "yes", "1e-6", "null", "!fc", "0x1"]),
    st.text(min_size=1, max_size=8).filter(lambda s: s.strip("! ") and not unprintable(s)),
)
entries = st.one_of(
    st.builds(
        lambda **o: prune("fade", **o),
        weights=st.one_of(patterns, st.lists(patterns, min_size=1, max_size=3)),
        sparsity=levels,
        when=spans,
        scope=st.sampled_from(["layer", "global"]),
        sizes=st.lists(st.integers(0, 9), max_size=3),
        limit=st.one_of(st.integers(0, 9), st.just("auto")),
        note=st.one_of(st.none(), patterns),
        share=st.floats(0, 1),
    ),
    st.builds(lambda when: prune("cut", when=when), spans),
    st.builds(lambda bits: quantize("grid", bits=bits), st.sampled_from([4, 8])),
)
trains = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(0, 1000),
        "label_smoothing": st.floats(0, 1),
        "clip_grad_norm": st.one_of(st.none(), st.floats(0.1, 10)),
        "channels_last": st.booleans(),
        "autocast": st.sampled_from(["none", "auto", "bf16", "fp16"]),
        "optimizer": st.sampled_from(
            [{"class": "Adam", "lr": 1e-6}, {"class": "SGD", "lr": 1, "nesterov": False}]
        ),
        "lr": st.sampled_from([None, {"class": "StepLR", "step_size": 2, "gamma": 1e-6}]),
    },
)


@given(
    st.integers(0, 2**63 - 1),
    trains,
    st.dictionaries(
        st.from_regex(r"[a-z0-9_][A-Za-z0-9_-]{0,5}", fullmatch=True), entries, max_size=4
    ),
)
def test_what_is_built_reads_back_equal(seed, train, methods):
    one = Recipe.build(seed=seed, train=train, methods=methods)
    two = loads(one.to_yaml())
    assert two == one
    assert two.sha == one.sha
    assert list(two.methods) == list(one.methods)
    assert two.to_yaml() == one.to_yaml()
