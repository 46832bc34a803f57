"""`prune: keep_zeros`: what is zero stays zero."""

import mask_case as case
import torch


def sparse():
    torch.manual_seed(0)
    model = case.Net()
    with torch.no_grad():
        model.stem.weight[:, 0] = 0
    return model


def test_zeros_stay_zero_under_training_and_the_rest_learns():
    model = sparse()
    before = model.stem.weight.detach().clone()
    s = case.session("keep_zeros, weights: stem", model)
    assert torch.equal(s.own_mask("m", "stem.weight"), before != 0)
    result = case.finished(s)
    assert torch.equal(result.model.stem.weight == 0, before == 0)
    assert (result.model.stem.weight != before)[:, 1:].all()
    (edit,) = result.plan.of_kind("mask")
    assert (edit.at, edit.sparsity) == ("stem.weight", 0.25)


def test_without_it_they_do_not():
    model = sparse()
    s = case.session("keep_zeros, weights: head", model)
    assert s.warnings == [("nothing-to-keep", "'m' finds no zero in the 1 tensors.")]
    assert not (case.finished(s).model.stem.weight == 0).any()


def few(lifetime):
    return (
        f"  few: {{prune: oneshot, weights: stem, sparsity: 0.5, lifetime: {lifetime}, "
        "when: {start: 0ep, stop: 2ep, every: 2ep}}\n"
    )


def test_at_a_time_it_takes_what_is_zero_then_under_masks_too():
    s = case.session("keep_zeros, weights: stem, when: {at: 1ep}", before=few("span"))
    result = case.finished(s)
    assert s.fired == {"few": 1, "m": 1}
    assert float((result.model.stem.weight == 0).float().mean()) == 0.5


def test_resumed_equals_uninterrupted(tmp_path):
    case.check_resume(
        "keep_zeros, weights: [stem, inner], when: {at: 1ep}", tmp_path, before=few("run")
    )
    result = case.check_resume("keep_zeros, weights: stem", tmp_path, make=sparse)
    assert float((result.model.stem.weight == 0).float().mean()) == 0.25


def test_wrong_options_are_refused():
    case.refused("keep_zeros", r"prune\.m needs 'weights'")
    case.refused("keep_zeros, weights: stem, sparsity: 0.5", r"has no key 'sparsity'")
    case.refused("keep_zeros, weights: nope", r"'nope' matches no tensor")
