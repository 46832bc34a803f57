import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_damage import damaged, loads_or_refuses

from gracile.errors import RecipeError
from gracile.recipe import Recipe, load, loads

TOY = "toy.yaml"


@pytest.fixture
def refuse(toy_methods, valid):
    """Load the valid recipe with one part replaced; return what RecipeError says."""
    assert isinstance(loads(valid), Recipe)

    def run(old: str, new: str) -> str:
        assert valid.count(old) == 1, f"{old!r} must stand once in the valid recipe"
        with pytest.raises(RecipeError) as caught:
            loads(valid.replace(old, new), name=TOY)
        return str(caught.value)

    return run


# (what is replaced, by what, line, what the message says: rule and value, way out)
WRONG_TYPE = [
    ("epochs: 3", "epochs: '3'", 5, "epochs must be a whole number, got '3'", "without quotes"),
    ("epochs: 3", "epochs: three", 5, "train.epochs must be a whole number, got 'three'", "Write"),
    ("epochs: 3", "epochs: true", 5, "train.epochs must be a whole number, got true", "Write"),
    ("epochs: 3", "epochs: 3.0", 5, "train.epochs must be a whole number, got 3.0", "decimals"),
    ("epochs: 3", "epochs: [3]", 5, "train.epochs must be a whole number, got [3]", "Write"),
    ("speedup: 2.5", "speedup: fast", 3, "speedup must be a number, got 'fast'", "such as 0.5"),
    ("std: [1, 1, 1]", "std: 1", 9, "data.std must be a list, got 1", "Write [a, b]"),
    ("std: [1, 1, 1]", "std: [1, a, 1]", 9, "data.std.1 must be a number, got 'a'", "Write"),
    ("goal: {speedup: 2.5, max_drop: 1.0}", "goal: 2.5", 3, "goal must be a mapping", "{speedup:"),
    ("{class: OneCycleLR, max_lr: 0.1}", "StepLR", 8, "lr must be a mapping", "Write {class:"),
    ("{prune: cut, when: {at: 2ep}}", "cut", 17, "methods.thin must be a mapping", "{prune:"),
    ("prune: fade", "prune: [fade]", 12, "prune.filters must name a prune method", "Known: cut"),
    ("{at: 2ep}", "2ep", 17, "prune.thin.when must be a mapping, got '2ep'", "Write {at:"),
    ("at: 2ep", "at: 2", 17, "a time needs a number and a unit", "write 2ep, 50it or 100mb"),
    ("{name: power, p: 3}", "7", 14, "prune.filters.criterion must be the name", "Known: flat"),
    ("p: 3}", "p: big}", 14, "option 'p' must be a whole number, got 'big'", "p"),
    ("p: 3}", "p: 1.5}", 14, "option 'p' must be a whole number, got 1.5", "p"),
    ("initial: 0.05", "initial: low", 15, "initial must be a number in [0, 1)", "got 'low'"),
    ("momentum: 0.9", "momentum: yes", 7, "momentum must be a number >= 0, got 'yes'", "leave"),
    ('"!conv1.weight"', "3", 13, "prune.filters.weights must be a text", "quotes"),
    ("quantize: grid", "quantize: grid, bits: 5", 18, "bits must be 4 or 8, got 5", "one of these"),
    ("prune: fade", "prune: fade\n    limit: never", 13, "a whole number or 'auto'", "of these"),
    ("prune: fade", "prune: fade\n    exact: yes", 13, "must be true or false, got 'yes'", "Write"),
    ("prune: fade", "prune: fade\n    note: 3", 13, "note must be a text, got 3", "quotes"),
    ("prune: fade", "prune: fade\n    sizes: 3", 13, "sizes must be a list, got 3", "Write [a"),
]  # fmt: skip
UNKNOWN_KEY = [
    ("epochs: 3", "epocs: 3", 5, "train has no key 'epocs'", "Nearest: 'epochs'"),
    ("methods:\n", "metods:\n", 10, "the recipe has no key 'metods'", "Nearest: 'methods'"),
    ("speedup: 2.5", "spedup: 2.5", 3, "goal has no key 'spedup'", "Nearest: 'speedup'"),
    ("    sparsity:", "    sparsty:", 15, "prune.filters has no key 'sparsty'", "'sparsity'"),
    ("final: 0.5", "finl: 0.5", 15, "filters.sparsity has no key 'finl'", "Nearest: 'final'"),
    ("p: 3}", "scal: 3}", 14, "filters.criterion has no key 'scal'", "Nearest: 'scale'"),
    ("name: power", "name: powr", 14, "unknown criterion 'powr'", "Nearest: 'power'"),
    ("ramp: cubic", "ramp: cubik", 15, "unknown ramp 'cubik'", "Nearest: 'cubic'"),
    ("momentum: 0.9", "momentun: 0.9", 7, "momentun is not an argument of SGD", "'momentum'"),
    ("class: SGD", "class: SDG", 7, "an optimizer of torch.optim that gracile knows", "'SGD'"),
    ("max_lr: 0.1", "max_rl: 0.1", 8, "max_rl is not an argument of OneCycleLR", "'max_lr'"),
    ("class: OneCycleLR", "class: OneCicleLR", 8, "got 'OneCicleLR'", "Nearest: 'OneCycleLR'"),
    ("at: 2ep", "att: 2ep", 17, "prune.thin.when has no key 'att'", "Nearest: 'at'"),
    ("prune: fade", "prun: fade", 12, "methods.filters needs a verb (prune, quantize)", "'prune'"),
    ("prune: fade", "prune: fad", 12, "must name a known prune method, got 'fad'", "'fade'"),
    ("prune: fade", "prune: fade\n    quantize: grid", 13, "has two verbs", "its own entry"),
    ("    when: {start: 0ep, stop: 2ep, every: 50it}\n", "", 11, "needs 'when'", "Add when:"),
    ("lr: 0.05, ", "", 7, "train.optimizer needs 'lr'", "Add lr:"),
    ("recipe: 1\n", "", 1, "the recipe needs 'recipe'", "Begin the file with recipe: 1"),
    ("initial: 0.05, final: 0.5", "initial: 0.05", 15, "sparsity needs 'final'", "Write {ramp:"),
]  # fmt: skip
DUPLICATE_KEY = [
    ("epochs: 3", "epochs: 3\n  epochs: 4", 6, "duplicate key 'epochs', first on line 5", "keep"),
    ("seed: 7", "seed: 7\nseed: 7", 3, "duplicate key 'seed', first on line 2", "keep one"),
    ("  thin:", "  filters:", 17, "duplicate key 'filters', first on line 11", "keep one"),
    ("momentum: 0.9", "lr: 0.9", 7, "duplicate key 'lr', first on line 7", "keep one"),
    ("prune: fade", "prune: fade\n    prune: cut", 13, "duplicate key 'prune'", "keep one"),
    ("momentum: 0.9", '"lr": 0.9', 7, "duplicate key 'lr'", "keep one"),
]  # fmt: skip
OUT_OF_RANGE = [
    ("final: 0.5", "final: 1.2", 15, "must be in [0, 1), got 1.2", "For 20 % write 0.2"),
    ("final: 0.5", "final: 1", 15, "must be in [0, 1), got 1", "0 changes nothing"),
    ("final: 0.5", "final: 50", 15, "must be in [0, 1), got 50", "For 50 % write 0.5"),
    ("initial: 0.05", "initial: -0.1", 15, "initial must be in [0, 1), got -0.1", "0 changes"),
    ("{ramp: cubic, initial: 0.05, final: 0.5}", "20%", 15, "got '20%'", "For 20 % write 0.2"),
    ("epochs: 3", "epochs: -1", 5, "train.epochs must be in [0, 1000000], got -1", "between"),
    ("batch_size: 64", "batch_size: 0", 6, "batch_size must be at least 1, got 0", "larger"),
    ("seed: 7", "seed: -7", 2, "seed must be at least 0, got -7", "larger"),
    ("seed: 7", f"seed: {2**63}", 2, "a whole number must fit 64 bits", "smaller"),
    ("recipe: 1", "recipe: 2", 1, "recipe must be 1, got 2", "Write 1"),
    ("lr: 0.05", "lr: 0", 7, "train.optimizer.lr must be more than 0, got 0", "larger"),
    ("lr: 0.05", "lr: .inf", 7, "a number must be finite, got .inf", "smaller"),
    ("lr: 0.05", "lr: 1e999", 7, "a number must be finite, got 1e999", "smaller"),
    ("speedup: 2.5", "speedup: 0.5", 3, "goal.speedup must be at least 1, got 0.5", "leave it out"),
    ("max_drop: 1.0", "max_drop: -1", 3, "goal.max_drop must be in [0, 100], got -1", "between"),
    ("max_lr: 0.1", "max_lr: 0", 8, "train.lr.max_lr must be a number > 0, got 0", "Change it"),
    ("calibration: 300", "calibration: 0", 9, "data.calibration must be rows", "Write 300"),
    ("test[5000:]", "test[5000", 9, "data.val must be rows of train, val or test", "Write"),
    ("test[5000:]", "testing", 9, "data.val must be rows of train, val or test", "Write"),
    ("std: [1, 1, 1]", "std: [1, 1]", 9, "data.std must be as long as mean (3)", "per channel"),
    ("std: [1, 1, 1]", "std: [1, 0, 1]", 9, "data.std.1 must be more than 0, got 0", "larger"),
    (", std: [1, 1, 1]", "", 9, "data needs both 'mean' and 'std'", "the other one"),
    ("prune: fade", "prune: fade\n    share: 30", 13, "must be in [0, 1], got 30", "write 0.3"),
    ("prune: fade", "prune: fade\n    multiple_of: 0", 13, "must be at least 1, got 0", "larger"),
    ("quantize: grid", "quantize: grid, low: 2", 18, "'low' must be below 'high'", "2.0 and 1.0"),
    ("class: SGD, lr: 0.05, momentum: 0.9", "class: SGD, lr: 0.05, nesterov: true", 7,
     "nesterov needs momentum > 0", "Set momentum: 0.9"),
    ("class: SGD, lr: 0.05, momentum: 0.9", "class: Adagrad, lr: 0.05", 8,
     "must not cycle momentum, which Adagrad has not", "Set cycle_momentum: false"),
    ('["type:Conv2d", "!conv1.weight"]', "[]", 13, "must name at least one pattern", 'Write "**"'),
    ('["type:Conv2d", "!conv1.weight"]', '""', 13, "must not be empty", 'Write "**"'),
    ('["type:Conv2d", "!conv1.weight"]', '"re:["', 13, "is not a regular expression", "position 0"),
    ("  thin:", "  thin.1:", 17, "must be named with letters, digits, _ and -", "Rename it"),
]  # fmt: skip
TIME = [
    ("at: 2ep", "at: -2ep", 17, "a time must not be negative, got '-2ep'", "0ep is the start"),
    ("start: 0ep", "start: -1ep", 16, "a time must not be negative, got '-1ep'", "0ep is"),
    ("every: 50it", "every: -50it", 16, "a time must not be negative", "0ep is the start"),
    ("every: 50it", "every: 0it", 16, "'every' must be more than 0", "every"),
    ("every: 50it", "every: 1.5it", 16, "whole numbers, got '1.5it'", "write 50it"),
    ("stop: 2ep", "stop: 0ep", 16, "stop (0ep) must be after start (0ep)", "exclusive"),
    ("at: 2ep", "at: 2ep, stop: 3ep", 17, "not 'at' with 'stop'", "give either"),
    ("{at: 2ep}", "{}", 17, "needs 'at', or 'start'", "with 'stop' and 'every'"),
    ("at: 2ep", "at: 2 epochs", 17, "got '2 epochs'", "write 2ep, 50it or 100mb"),
]  # fmt: skip
BOMB = "&a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
YAML = [
    ("seed: 7", "seed: !!python/object/apply:os.system [a]", 2, "tags are not", "remove"),
    ("seed: 7", "seed: !!int 7", 2, "tags are not allowed", "remove"),
    ('"!conv1.weight"', "!conv1.weight", 13, "tags are not allowed", "into quotes"),
    ("seed: 7", "seed: !e!x 7", 2, "undefined tag handle", "into quotes"),
    ("seed: 7", "a: " + BOMB, 5, "must not have more than 10000 values", "shorter"),
    ("seed: 7", "seed: &s [*s]", 2, "'*s' repeats nothing", "into quotes"),
    ('"!conv1.weight"', "*.weight", 13, "while scanning an alias", "quotes"),
    ("seed: 7", "<<: {seed: 7}", 2, "merge keys (<<) are not allowed", "write the keys out"),
    ("seed: 7", "seed: " + "[" * 60 + "]" * 60, 2, "nested deeper than 50", "flatter"),
    ("seed: 7", "seed: " + "[" * 9000, 2, "nested deeper than 50", "flatter"),
    ("seed: 7", "seed: [" + "1, " * 11_000 + "]", 2, "more than 10000 values", "shorter"),
    ("  epochs: 3", "\tepochs: 3", 5, "'\\t' that cannot start", "spaces, not tabs"),
    ("seed: 7", "seed: 7\n---\nseed: 8", 3, "a file holds one recipe", "remove the '---'"),
    ("seed: 7", "7: 7", 2, "a key must be a text, got 7", "quotes"),
    ("seed: 7", "? [a, b]\n: 7", 2, "a key must be a text, got something nested", "key: value"),
    ("seed: 7", "null: 7", 2, "a key must be a text, got null", "quotes"),
    ("seed: 7", "seed 7", 3, "could not find expected ':'", "write key: value"),
    ("at: end}}", 'at: "end}}', 18, "while scanning a quoted scalar", "close the quote"),
    ("seed: 7", "seed: {a: 7", 3, "expected ',' or '}'", "close the bracket"),
    ("seed: 7", "seed: @7", 2, "cannot start any token", "into quotes"),
    ("seed: 7", "seed: a: b", 2, "mapping values are not allowed", "into quotes"),
    ("seed: 7", 'seed: "\\U99999999"', 2, "a number in an escape", "correct it"),
    ("seed: 7", 'seed: "\\ud800"', 2, "must be printable text", "remove it"),
    ("seed: 7", "seed: \x07", 2, "must be printable text, found the character 0x7", "remove it"),
    ("seed: 7", "seed: 7\n" + "k" * 300 + ": 1", 3, "not be longer than 200 letters", "shorten"),
    ("recipe: 1", "%YAML " + "9" * 5000 + ".1\n---\nrecipe: 1", 1, "too large", "correct it"),
]  # fmt: skip
ALL = [*WRONG_TYPE, *UNKNOWN_KEY, *DUPLICATE_KEY, *OUT_OF_RANGE, *TIME, *YAML]


def _id(value: object) -> str:
    return re.sub(r"\W+", "-", str(value))[:32]


@pytest.mark.parametrize(("old", "new", "line", "says", "way_out"), ALL, ids=_id)
def test_one_message_with_line_rule_value_and_way_out(refuse, old, new, line, says, way_out):
    said = refuse(old, new)
    assert said.startswith(f"{TOY}:{line}: ")
    assert says in said
    assert way_out in said
    assert "\n" not in said
    assert "pydantic" not in said
    assert len(said) < 700


def test_the_house_example_word_by_word(toy_methods, valid):
    text = valid.replace("{ramp: cubic, initial: 0.05, final: 0.5}", "1.2")
    with pytest.raises(RecipeError) as caught:
        loads(text, "recipes/r20.yaml")
    assert str(caught.value) == (
        "recipes/r20.yaml:15: prune.filters.sparsity must be in [0, 1), got 1.2. "
        "For 20 % write 0.2."
    )


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "the recipe is empty; begin it with 'recipe: 1'"),
        ("# nothing\n\n# here\n", 4, "the recipe is empty"),
        ("---\n...\n", 2, "a recipe must be a mapping, got nothing"),
        ("- recipe: 1", 1, "a recipe must be a mapping, got a list. Begin it with recipe: 1."),
        ("recipe", 1, "a recipe must be a mapping, got a text"),
        ("\n\n3", 3, "a recipe must be a mapping, got a single value"),
        (b"recipe: 1\nseed: \xff", 2, "must be UTF-8 text, got the byte 0xff. Save the file"),
        ("recipe: 1".encode("utf-16"), 1, "must be UTF-8 text"),
        (b"#" * (1 << 20) + b"#", 1, "must not be larger than 1 MiB"),
        ("#" * (1 << 20) + "#", 1, "must not be larger than 1 MiB"),
    ],
    ids=_id,
)
def test_what_is_no_recipe_at_all(text, line, says):
    with pytest.raises(RecipeError) as caught:
        loads(text, "x.yaml")
    assert str(caught.value).startswith(f"x.yaml:{line}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("r21.yaml", "no such recipe. Nearest: 'r20.yaml'."),
        ("other", "no such recipe. Known: r20.yaml."),
        ("no/such/folder.yaml", "no such recipe."),
        ("folder", "must be a file, got a folder. Name a file in it."),
    ],
)
def test_a_missing_file_names_what_is_there(tmp_path, name, says):
    (tmp_path / "r20.yaml").write_text("recipe: 1\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}:1: ")
    assert says in str(caught.value)


@settings(max_examples=400)
@given(data=st.data())
def test_a_damaged_recipe_loads_or_is_refused_with_its_line(toy_methods, valid, data):
    loads_or_refuses(data.draw(damaged(valid)))


@settings(max_examples=300)
@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin-1"))))
def test_any_text_is_refused_with_its_line(text):
    with pytest.raises(RecipeError, match=r"^any:\d+: "):
        loads(text, name="any")
    with pytest.raises(RecipeError, match=r"^any:\d+: "):
        loads(text.encode("utf-8", "surrogatepass"), name="any")
