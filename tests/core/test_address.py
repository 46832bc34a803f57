import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.core.address import compile_pattern, select
from gracile.errors import BindError

TENSORS = [
    "weight",
    "conv1.weight",
    "bn1.weight",
    "bn1.bias",
    "layer1.0.conv1.weight",
    "layer1.0.conv2.weight",
    "layer1.1.conv1.weight",
    "layer2.0.conv1.weight",
    "fc.weight",
    "fc.bias",
    "attn.in_proj_weight",
]
TYPES = {
    "": ["Net"],
    "conv1": ["Conv2d", "_ConvNd"],
    "bn1": ["BatchNorm2d", "_BatchNorm"],
    "layer1.0.conv1": ["Conv2d", "_ConvNd"],
    "layer1.0.conv2": ["Conv2d", "_ConvNd"],
    "layer1.1.conv1": ["Conv2d", "_ConvNd"],
    "layer2.0.conv1": ["Conv2d", "_ConvNd"],
    "fc": ["Linear"],
    "attn": ["MultiheadAttention"],
    "relu": ["ReLU"],
}
CONVS = [t for t in TENSORS if "conv" in t]


def pick(*patterns: str) -> list[str]:
    return select(patterns[0] if len(patterns) == 1 else patterns, TENSORS, TYPES)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (("fc.weight",), ["fc.weight"]),
        (("fc",), ["fc.weight"]),
        (("fc.bias",), ["fc.bias"]),
        (("layer1.*.conv1",), ["layer1.0.conv1.weight", "layer1.1.conv1.weight"]),
        (("layer1.*.conv1.weight",), ["layer1.0.conv1.weight", "layer1.1.conv1.weight"]),
        (("*.bias",), ["bn1.bias", "fc.bias"]),
        (("*",), ["weight", "conv1.weight", "bn1.weight", "fc.weight"]),
        (("**",), TENSORS),
        (("layer?.0.conv1",), ["layer1.0.conv1.weight", "layer2.0.conv1.weight"]),
        (("re:layer[12].*conv1.weight",), [CONVS[1], CONVS[3], CONVS[4]]),
        (("re:fc",), ["fc.weight"]),
        (("type:Conv2d",), CONVS),
        (("type:_ConvNd",), CONVS),
        (("type:Net",), ["weight"]),
        (("fc", "conv1"), ["conv1.weight", "fc.weight"]),
        (("type:Conv2d", "!conv1"), CONVS[1:]),
        (("!re:.*conv.*", "!**.bias"), ["weight", "bn1.weight", "fc.weight", TENSORS[-1]]),
        (("!type:Conv2d", "type:Conv2d", "fc"), ["fc.weight"]),
    ],
    ids=str,
)
def test_what_a_selector_means(patterns, chosen):
    assert pick(*patterns) == chosen


def test_dots_and_brackets_are_plain_in_globs():
    with pytest.raises(BindError):
        pick("fc_weight")
    with pytest.raises(BindError):
        pick("conv[1]")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("layer3.*.conv9.weight",), r"'layer3\.\*\.conv9\.weight' matches no tensor.*Nearest"),
        (("type:Conv3d",), r"'type:Conv3d' matches no tensor.*Nearest: 'Conv2d'"),
        (("type:ReLU",), r"'relu' has no weight of its own"),
        (("type:MultiheadAttention",), r"'attn' has no weight of its own"),
        (("fc", "nothing"), r"'nothing' matches no tensor"),
        (("fc", "!nothing"), r"'nothing' matches no tensor"),
        (("!**",), r"everything is subtracted"),
        (("re:(",), r"'re:\(' is not a regular expression"),
        (("re:a{99999999999}",), r"is not a regular expression"),
        (("re:" + "(" * 5000,), r"is not a regular expression"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_pattern_without_match_is_refused(patterns, message):
    with pytest.raises(BindError, match=message):
        pick(*patterns)


def test_the_message_names_the_model_and_the_kind():
    with pytest.raises(BindError, match=r"'x' matches no operator in ResNet20"):
        select("x", TENSORS, TYPES, what="operator", model="ResNet20")


def test_an_empty_selector_is_refused():
    with pytest.raises(BindError, match="empty selector"):
        select([], TENSORS, TYPES)


def test_a_doubtful_regular_expression_warns_nobody():
    assert compile_pattern("re:[[]x").fullmatch("[x")


names = st.lists(st.text("ab.", min_size=1, max_size=6), min_size=1, max_size=12, unique=True)


@given(names, st.data())
def test_a_name_selects_itself_and_its_complement_is_the_rest(tensors, data):
    one = data.draw(st.sampled_from(tensors))
    assert select(one, tensors, {}) == [one]
    rest = [t for t in tensors if t != one]
    if rest:
        assert select(["**", "!" + one], tensors, {}) == rest


@given(names, st.text("ab.*?", min_size=1, max_size=6))
def test_a_selection_keeps_order_and_has_no_doubles(tensors, pattern):
    try:
        got = select([pattern, pattern, "**"], tensors, {})
    except BindError:
        return
    assert got == tensors
