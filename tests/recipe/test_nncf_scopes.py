import pytest
from hypothesis import given
from hypothesis import strategies as st
from nncf_case import WEIGHTED, Net

from gracile.errors import UserError
from gracile.recipe.nncf import resolve_scopes
from gracile.recipe.nncf.scopes import layers_of, scope_of

NET = Net()
LAYERS = layers_of(NET)
CONV2 = "Net/Sequential[layer1]/Block[0]/NNCFConv2d[conv2]/conv2d_0"


def test_a_scope_is_the_attributes_in_its_brackets():
    assert resolve_scopes(CONV2) == ["layer1.0.conv2"]
    assert resolve_scopes(CONV2, NET) == ["layer1.0.conv2"]
    assert resolve_scopes(["Net/NNCFConv2d[stem]", "Net/Linear[fc]/linear_0"]) == ["stem", "fc"]


@given(st.sampled_from(WEIGHTED))
def test_scope_of_is_undone(path):
    scope = scope_of(path, LAYERS)
    assert resolve_scopes(scope, NET) == resolve_scopes(scope) == [path]


@given(st.lists(st.sampled_from(WEIGHTED), unique=True, min_size=1))
def test_a_pattern_for_each_is_their_union(paths):
    patterns = [
        "{re}.*" + scope_of(p, LAYERS)[4:].replace("[", r"\[").replace("]", r"\]") for p in paths
    ]
    assert resolve_scopes(patterns, NET) == paths


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        (r"{re}Net/NNCFLinear\[fc\]/.*", ["fc"]),
        (r"{re}Net/NNCFConv2d\[stem\]", ["stem"]),
        (r"{re}Block\[1\]", ["layer1.1.conv1", "layer1.1.conv2"]),
        (r"{re}conv2d_0$", WEIGHTED[:-1]),
        (r"{re}.*", WEIGHTED),
        (r"{re}(stem|fc)", ["stem", "fc"]),
        (r"{re}Conv2d\[(stem|conv9)\]/conv2d_0|OUTPUT", ["stem"]),
    ],
)
def test_a_pattern_is_searched_in_the_scopes_of_all_modules(pattern, paths):
    assert resolve_scopes(pattern, NET) == paths


def test_a_container_means_the_layers_in_it():
    assert resolve_scopes("Net/Sequential[layer1]/Block[0]", NET) == WEIGHTED[1:3]


def test_names_of_classes_are_enough_of_a_model():
    names = {"": "Net", "body": "Sequential", "body.0": ["MyConv", "Conv2d", "_ConvNd"]}
    assert resolve_scopes("Net/Sequential[body]/Conv2d[0]/conv2d_0", names) == ["body.0"]


@pytest.mark.parametrize(
    "scope",
    [
        *("/nncf_model_input_0|OUTPUT", "Net/Sequential[layer1]/Block[0]/__add___0"),
        *("Net/Sequential[layer1]/Block[0]/ReLU[relu]/relu__0", r"{re}ReLU\[relu\]"),
    ],
)
def test_an_operator_without_weights_is_told_and_left_out(scope):
    told = []
    assert resolve_scopes([scope, "Net/Linear[fc]"], NET, tell=told.append) == ["fc"]
    assert told == [f"'{scope}' is an operator without weights; it is left out."]


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("Net/Linear[fd]/linear_0", r"not in the model\. Nearest: 'Net/Linear\[fc\]/linear_0'"),
        ("Net/Conv2d[fc]/conv2d_0", r"'fc' is a Linear, not a Conv2d"),
        ("Net/ModuleList[layer1]/Block[0]/Conv2d[conv1]", "'layer1' is a Sequential, not a Module"),
        ("Net/fc", r"is not a scope\. Write"),
        ("fc", "is not a scope"),
        (r"{re}Block\[7\]", "matches no module of the model"),
        ("{re}[", "is not a regular expression"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest(scope, message):
    with pytest.raises(UserError, match=message):
        resolve_scopes(scope, NET)
    told = []
    assert resolve_scopes(scope, NET, validate=False, tell=told.append) == []
    assert len(told) == 1
    assert told[0].endswith("It is left out.")


@pytest.mark.parametrize("scope", ["{re}.*", "Net/Sequential[layer1]"])
def test_what_needs_the_model_says_so(scope):
    with pytest.raises(UserError, match="Pass --model MODEL"):
        resolve_scopes(scope)
