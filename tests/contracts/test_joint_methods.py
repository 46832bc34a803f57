"""Any methods in one recipe: refused before training with one message, or a result that is true."""

import joint_cases as joint
import method_cases as cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.errors import BindError, RecipeError
from gracile.recipe.load import loads
from gracile.train.session import Session


@st.composite
def recipes(draw):
    names = draw(st.lists(st.sampled_from(cases.names()), min_size=2, max_size=4, unique=True))
    times = [draw(st.sampled_from((None, *joint.TIMES))) for _ in names]
    return joint.joint(names, times)


@settings(max_examples=8, deadline=None)
@given(recipes())
def test_any_combination_is_refused_at_bind_or_keeps_its_promises(text):
    try:
        loads(text, name="joint.yaml")
    except RecipeError:  # a time that a method does not take
        return
    s = joint.bound(text)
    if s is not None:
        joint.check(s)


def bind(methods: str) -> Session:
    text = f"recipe: 1\ntrain: {{epochs: 3}}\nmethods:\n{methods}"
    model = cases.Tiny()
    return Session(
        model, loads(text, name="r.yaml"), cases.torch.optim.SGD(model.parameters(), lr=0.1),
        example=cases.data(99)[0][0][:4], steps_per_epoch=cases.STEPS, calibration=cases.data(77),
        val=lambda: cases.data(55),
    )  # fmt: skip


REWIRING = (
    "lowrank: factorize, weights: [inner, outer], round_to: 2, rank: {name: macs, ratio: 0.6}",
    "prune: depth, count: 1",
)


@pytest.mark.parametrize("entry", REWIRING)
@pytest.mark.parametrize("begins", ["qat, when: {start: 0ep}", "binary, when: {start: 1ep}",
                                    "ptq, when: {at: 1ep}"])  # fmt: skip
def test_operators_are_not_replaced_after_activations_are_quantized(entry, begins):
    late = f"  few: {{{entry}, when: {{at: 2ep}}}}\n  q: {{quantize: {begins}}}\n"
    with pytest.raises(BindError, match=r"r.yaml:4: 'few' \(line 4\) changes operators after 'q'"):
        bind(late)
    bind(late.replace("2ep", "0ep"))


def test_at_one_instant_the_order_of_the_recipe_counts():
    few, q = f"  few: {{{REWIRING[1]}, when: {{at: end}}}}\n", "  q: {quantize: ptq}\n"
    bind(few + q)
    with pytest.raises(BindError, match="before 'q' begins"):
        bind(q + few)


@pytest.mark.parametrize("sharing", ["levels", "product", "share, keep_zeros: false"])
def test_weights_are_not_masked_whose_values_have_no_zero(sharing):
    few = '  few: {prune: oneshot, weights: "type:Conv2d", sparsity: 0.5, when: {at: 0ep}}\n'
    share = f"  few_values: {{quantize: {sharing}, weights: [inner], when: {{at: end}}}}\n"
    for text in (few + share, share + few):
        with pytest.raises(
            BindError, match=r"'few' \(line \d\) masks 'inner.weight'.*have no zero"
        ):
            bind(text)
    bind(few.replace('"type:Conv2d"', "outer") + share)
    filters = few.replace("sparsity", "granularity: filter, sparsity")
    bind(filters + "  thin: {prune: thin, when: {at: 1ep}}\n" + share)


@pytest.mark.parametrize("entry", ["bias", "accuracy, max_drop: 1"])
def test_what_makes_up_for_quantization_fires_behind_it(entry):
    text = (
        f"  q: {{quantize: ptq, when: {{at: 1ep}}}}\n  m: {{recover: {entry}, when: {{at: 0ep}}}}\n"
    )
    with pytest.raises(BindError, match="'m' fires while nothing is quantized"):
        bind(text)
    bind(text.replace("0ep", "1ep"))


def found(names, times=None):
    """What came out of combinations that once went wrong."""
    s = joint.bound(joint.joint(names, times or [None] * len(names)))
    assert s is not None
    joint.check(s)


def test_masks_that_end_behind_a_codebook_are_zeros_in_it():
    found(["quantize/share", "prune/gates"])


def test_a_ticket_goes_on_without_the_layers_that_were_replaced():
    found(["lowrank/factorize", "prune/lottery"])


def test_a_penalty_follows_a_cut_of_what_others_learn_a_mask_for():
    found(["regularize/penalty", "prune/movement", "prune/structure"], [None, "0ep", None])


def test_a_cut_of_what_others_have_replaced_is_a_warning():
    found(["prune/depth", "lowrank/factorize", "prune/structure"], ["0ep", "0ep", None])
