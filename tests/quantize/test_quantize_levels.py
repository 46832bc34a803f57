"""Levels in buckets: values by hand, noise, gradients of levels, training, files."""

import pytest
import sharing_case as case
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gracile.analyze.layers import stored_bytes
from gracile.errors import BindError, RecipeError
from gracile.models.spec import ModelSpec
from gracile.quantize.bucketed import (
    Bucketed,
    in_buckets,
    nearest_codes,
    ranges,
    restore,
    uniform_codes,
)
from gracile.train.checkpoint import load_model, load_state, save_model, save_state
from gracile.train.packing import made

UNIFORM = "m: {quantize: levels, bits: 2, bucket: 64, when: {start: 1ep}}"
NOISY = UNIFORM.replace("bits: 2", "bits: 2, rounding: stochastic")
LEARNED = UNIFORM.replace("bits: 2", "bits: 2, levels: learned, codebook_lr: 1e-2")
BOTH = LEARNED.replace("bits: 2", "bits: 2, train_weights: true")
KD = "teacher: {distill: kd, temperature: 2}"


def even(k, bucket, straight=True):
    return Bucketed(torch.linspace(0, 1, k), bucket, learned=False, straight=straight)


def learned(levels, bucket, straight=False):
    return Bucketed(torch.tensor(levels), bucket, learned=True, straight=straight)


def values_of(result):
    return {**result.model.state_dict(), **result.tensors}


# ------------------------------------------------------------------ by hand


def test_each_bucket_is_scaled_to_its_own_ends():
    weight = torch.tensor([[0.0, 3.0, 1.2], [-8.0, 4.0, -1.5]])
    got = even(4, 3)(weight)  # steps of 1 and of 4
    torch.testing.assert_close(got, torch.tensor([[0.0, 3.0, 1.0], [-8.0, 4.0, 0.0]]))
    got = even(4, None)(weight)  # one bucket, steps of 4 from -8
    torch.testing.assert_close(got, torch.tensor([[0.0, 4.0, 0.0], [-8.0, 4.0, 0.0]]))


def test_the_last_bucket_holds_what_is_left():
    assert in_buckets(torch.arange(5.0), 3).tolist() == [[0, 1, 2], [3, 4, 4]]
    assert [x.tolist() for x in ranges(torch.arange(5.0), 3)] == [[0, 3], [2, 1]]
    assert even(2, 3)(torch.arange(5.0)).tolist() == [0, 0, 2, 3, 4]  # a half goes to the even one


def test_equal_weights_stay_as_they_are():
    assert torch.equal(even(4, 2)(torch.full((4,), 0.3)), torch.full((4,), 0.3))


def test_the_nearest_of_learned_levels():
    places = torch.tensor([0.0, 0.29, 0.31, 0.9])
    assert nearest_codes(places, torch.tensor([0.1, 0.5, 0.8])).tolist() == [0, 0, 1, 2]
    weight = torch.tensor([0.0, 2.9, 3.1, 10.0])
    torch.testing.assert_close(learned([0.8, 0.1, 0.5], 4)(weight), torch.tensor([1, 1, 5, 8.0]))


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 40))
def test_the_nearest_level_is_half_a_step_away_at_most(seed, bits, bucket):
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(seed))
    k = 2**bits
    low, width = ranges(weight, bucket)
    step = (width / (k - 1)).repeat_interleave(bucket)[: weight.numel()].reshape(weight.shape)
    overlay = even(k, bucket)
    assert bool(((overlay(weight) - weight).abs() <= 0.5 * step + 1e-6).all())
    overlay.settle(weight)
    assert torch.equal(
        restore(overlay.codebook, overlay.codes, low, width, bucket), overlay(weight)
    )


# ------------------------------------------------------------------ stochastic rounding


def test_noise_rounds_to_a_neighbour_with_the_chance_of_its_nearness():
    places = torch.tensor([0.0, 0.1, 1 / 3, 0.9, 1.0]).repeat(20_000, 1)
    noise = torch.rand(places.shape, generator=torch.Generator().manual_seed(0))
    codes = uniform_codes(places, 4, noise)
    at = places * 3
    assert bool(((codes - at).abs() < 1 + 1e-6).all())
    torch.testing.assert_close(codes.double().mean(0), at[0].double(), atol=0.012, rtol=0)
    assert codes[:, 0].max() == 0
    assert codes[:, 4].min() == 3


def test_noise_is_drawn_anew_for_each_batch_and_the_same_again():
    s = case.session(NOISY)
    case.train(s, 0, 2)
    x = s.methods[0].shared["second.weight"]
    weight = s.parameter("second.weight").detach()
    seen = []
    for batch in (0, 1, 0):
        s.epoch_number, s.batch = 2, batch
        s.methods[0].on_batch_start(s)
        seen.append(x(weight))
    s.methods[0].on_batch_end(s)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(x(weight), even(4, 64)(weight))  # nearest outside of training


# ------------------------------------------------------------------ gradients


def test_the_gradient_passes_straight_through_to_the_weight():
    weight = torch.randn(3, 5, requires_grad=True)
    g = torch.randn(3, 5)
    (even(4, 4)(weight) * g).sum().backward()
    assert torch.equal(weight.grad, g)


def test_the_gradient_of_a_level_is_that_of_finite_differences():
    torch.manual_seed(0)
    weight, target = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    levels = torch.tensor([0.05, 0.4, 0.6, 0.95], dtype=torch.float64)
    overlay = Bucketed(levels, 8, learned=True, straight=False)

    def loss(at):
        with torch.no_grad():
            overlay.values.copy_(at)
        return ((overlay(weight) - target) ** 2).sum()

    loss(levels).backward()
    for j in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[j] = 1e-6
        numeric = (loss(levels + step) - loss(levels - step)) / 2e-6
        torch.testing.assert_close(overlay.values.grad[j], numeric.detach(), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_level_by_hand():
    weight = torch.tensor([0.0, 1.0, 2.0, 0.0, 10.0, 9.0], requires_grad=True)  # widths 2 and 10
    overlay = learned([0.0, 1.0], 3)
    (overlay(weight) * torch.tensor([1.0, 0.1, 0.2, 1.0, 0.3, 0.4])).sum().backward()
    assert weight.grad is None
    # level 0: 2 (1 + 0.1) + 10 (1); level 1: 2 (0.2) + 10 (0.3 + 0.4)
    torch.testing.assert_close(overlay.values.grad, torch.tensor([12.2, 7.4]))


# ------------------------------------------------------------------ in a session


def moved(entry, address="second.weight"):
    """(stored weight before and after training, levels before and after)."""
    s = case.session(entry)
    case.train(s, 0, 1)
    before = s.parameter(address).detach().clone()
    s.on_epoch_begin(1)
    start = s.methods[0].shared[address].values.detach().clone()
    s = case.session(entry)
    case.train(s)
    after = s.methods[0].shared[address].values.detach()
    return (before, s.parameter(address).detach().clone()), (start, after)


@pytest.mark.parametrize(
    ("entry", "weights", "levels"),
    [(UNIFORM, True, False), (NOISY, True, False), (LEARNED, False, True), (BOTH, True, True)],
)
def test_what_training_moves(entry, weights, levels):
    of_weights, of_levels = moved(entry)
    assert torch.equal(*of_weights) is not weights
    assert torch.equal(*of_levels) is not levels


def test_learned_levels_start_at_quantiles():
    _, (start, _) = moved(LEARNED)
    assert torch.equal(start, start.sort().values)
    assert start.min() > 0
    assert start.max() < 1
    assert start.diff().min() > 0.05


def test_a_plan_names_what_makes_the_weights():
    _, result = case.trained(UNIFORM)
    (edit,) = [e for e in result.plan.of_kind("share") if e.at == "second.weight"]
    assert (edit.levels, edit.block, edit.bucket) == (4, 1, 64)
    weight = result.model.get_parameter(edit.at).detach()
    assert torch.equal(made(result.tensors, edit.key), weight)
    assert all(len(part.unique()) <= 4 for part in in_buckets(weight, 64))
    assert result.tensors[f"{edit.key}.low"].shape == (14,)  # of 864 weights


def test_size_counts_the_ends_of_buckets():
    _, result = case.trained(UNIFORM.replace("bits: 2", "bits: 2, weights: second"))
    rest = sum(p.numel() for n, p in result.model.named_parameters() if n != "second.weight")
    want = 4 * rest + 864 * 2 // 8 + 4 * 4 + 14 * 8
    assert stored_bytes(result.model, result.plan) == want


@pytest.mark.parametrize("entry", [NOISY, LEARNED, BOTH])
def test_a_run_that_is_cut_and_resumed_ends_the_same(entry, tmp_path):
    methods = (entry, case.CUT)
    _, whole = case.trained(*methods)
    first = case.session(*methods)
    case.train(first, 0, 2)
    save_state(tmp_path / "s.safetensors", first.state_dict())
    second = case.session(*methods)
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    case.train(second, 2, 3)
    resumed = second.finish()
    assert resumed.plan == whole.plan
    values, same = values_of(resumed), values_of(whole)
    assert values.keys() == same.keys()
    assert all(torch.equal(values[k], same[k]) for k in same)
    assert made(whole.tensors, "second.weight.shared").shape == (6, 4, 3, 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("entry", [UNIFORM, LEARNED])
def test_what_is_saved_is_read_back(entry, packed, tmp_path):
    _, result = case.trained(entry)
    save_model(tmp_path, result, packed=packed)
    example = case.batches(99)[0][0][:2]
    again = load_model(
        tmp_path,
        example,
        factory=lambda: ModelSpec(case.small(), result.plan.architecture, "", "test"),
    )
    assert torch.equal(again.model(example), result.model.eval()(example))
    assert again.plan == result.plan


def test_a_teacher_beside_it():
    _, result = case.trained(KD, UNIFORM)
    assert len(result.plan.of_kind("share")) == 3


@pytest.mark.parametrize("first", [True, False])
def test_a_masked_tensor_is_refused(first):
    few = (
        f"few: {{prune: oneshot, weights: second, sparsity: 0.5, when: {{at: {2 - 2 * first}ep}}}}"
    )
    with pytest.raises(BindError, match=r"masks 'second.weight'.*keep_zeros: true"):
        case.trained(few, UNIFORM)


def test_learned_levels_are_not_rounded_with_noise():
    with pytest.raises(RecipeError, match=r"rounded to the nearest.*levels: uniform"):
        case.session(LEARNED.replace("bits: 2", "bits: 2, rounding: stochastic"))


def test_levels_that_have_no_time_to_learn_are_refused():
    with pytest.raises(RecipeError, match=r"poor before any training.*start: 0ep"):
        case.session("m: {quantize: levels, levels: learned}")


def test_noise_helps_no_network_after_training():
    _, result = case.trained(NOISY)
    x = case.batches(5)[0][0]
    assert torch.equal(result.model(x), result.model(x))
    assert torch.isfinite(F.cross_entropy(result.model(x), case.batches(5)[0][1]))
