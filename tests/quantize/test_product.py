"""Product quantization: codebooks by hand, the error they leave, and its correction."""

import pytest
import sharing_case as case
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError
from gracile.quantize.codebook import restore, stretched
from gracile.quantize.error_correction import fit_responses, response_error

AT_END = "when: {at: end}"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def parts_of(result, address):
    return [result.tensors[f"{address}.shared.{p}"] for p in ("codebook", "codes", "columns")]


# ------------------------------------------------------------------ the form


@pytest.mark.parametrize("shape", [(5, 7), (4, 8, 3, 3), (2, 1, 3), (3, 5, 1, 1)])
def test_a_codebook_of_all_vectors_makes_the_weight_again(shape):
    w = torch.randn(shape, generator=rng())
    parts, columns = stretched(w, 3)
    vectors = parts.movedim(2, -1).transpose(0, 1)  # (S, O, ..., d)
    codes = torch.arange(vectors[0].numel() // 3).reshape(vectors[0].shape[:-1])
    codes = codes.unsqueeze(1).expand(-1, len(vectors), *[-1] * (codes.dim() - 1))
    assert torch.equal(restore(vectors.flatten(1, -2), codes, columns), w)


def test_a_linear_layer_by_hand():
    # Two stretches of two inputs, two words each: output 0 takes words 0 and 1, output 1 both 1.
    book = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    codes = torch.tensor([[0, 1], [1, 1]])
    assert restore(book, codes).tolist() == [[1, 2, 7, 8], [3, 4, 7, 8]]
    columns = torch.tensor([0, 3])
    assert restore(book, codes, columns).tolist() == [[1, 8], [3, 8]]


# ------------------------------------------------------------------ error correction


def layer(groups=1, outputs=6, channels=4, places=2, seed=0):
    """A random layer with a codebook, and sums of random responses."""
    g = rng(seed)
    book = torch.randn(2, 3, channels // 2, generator=g, dtype=torch.float64)
    codes = torch.randint(3, (outputs, 2, places), generator=g)
    size = channels * places
    x = torch.randn(groups, 50, size, generator=g, dtype=torch.float64)
    y = torch.randn(groups, 50, outputs // groups, generator=g, dtype=torch.float64)
    return book, codes, x, y


def sums(x, y):
    return x.transpose(1, 2) @ x, x.transpose(1, 2) @ y


def test_the_error_is_that_of_the_responses():
    book, codes, x, y = layer(groups=2)
    w = restore(book, codes)
    given = x @ w.reshape(2, 3, -1).transpose(1, 2)
    got = response_error(w, *sums(x, y)) + float(y.square().sum())
    assert got == pytest.approx(float((y - given).square().sum()))


def test_equation_9_by_hand():
    # One input channel, one word for both outputs: it is (sum x r) / (n sum x^2) with r the mean
    # wanted response: x = (1, 2), y = (2, 4) and (4, 8): slopes 2 and 4, so the word is 3.
    x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    y = torch.tensor([[[2.0, 4.0], [4.0, 8.0]]], dtype=torch.float64)
    book, codes = fit_responses(
        torch.tensor([[[10.0], [0.0]]], dtype=torch.float64),
        torch.zeros(2, 1, 1, dtype=torch.int64),
        *sums(x, y),
        rounds=1,
    )
    torch.testing.assert_close(
        book[0, codes.flatten()], torch.full((2, 1), 3.0, dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_equation_10_takes_the_word_with_the_smallest_error():
    x = torch.eye(2, dtype=torch.float64)[None]
    y = torch.tensor([[[1.0, 5.0, 5.0], [1.0, 5.0, 5.2]]], dtype=torch.float64)
    start = torch.tensor([[[1.0, 1.0], [5.0, 5.0]]], dtype=torch.float64)
    wrong = torch.tensor([0, 1, 0]).reshape(3, 1, 1)
    book, codes = fit_responses(start, wrong, *sums(x, y), rounds=5)
    assert codes.flatten().tolist() == [0, 1, 1]
    wanted = torch.tensor([[1.0, 1.0], [5.0, 5.1]], dtype=torch.float64)
    torch.testing.assert_close(book[0], wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_no_round_makes_the_error_larger(groups, seed):
    book, codes, x, y = layer(groups, seed=seed)
    gram, right = sums(x, y)
    before = response_error(restore(book, codes), gram, right)
    for _ in range(4):
        book, codes = fit_responses(book, codes, gram, right, rounds=1)
        after = response_error(restore(book, codes), gram, right)
        assert after <= before + 1e-3
        before = after


def test_a_weight_that_the_codebook_can_make_is_found_again():
    book, codes, x, _ = layer()
    wanted = restore(book, codes)
    y = x @ wanted.reshape(1, 6, -1).transpose(1, 2)
    near = book + 0.05 * torch.randn(book.shape, generator=rng(1), dtype=torch.float64)
    found, again = fit_responses(near, codes, *sums(x, y), rounds=300)
    torch.testing.assert_close(restore(found, again), wanted, rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------ the method


def result_of(entry, model=None):
    return case.session(f"m: {{quantize: product, {entry}, {AT_END}}}", model=model, epochs=0)


def test_what_a_plan_names_makes_the_weights():
    s = result_of("weights: [second, head], subspace: 3, words: 3")
    result = s.finish()
    edits = {e.at: e for e in result.plan.of_kind("share")}
    assert {a: (e.levels, e.block) for a, e in edits.items()} == {
        "second.weight": (3, 3),
        "head.weight": (3, 3),
    }
    for a in edits:
        assert torch.equal(restore(*parts_of(result, a)), result.model.get_parameter(a))
    book, codes, columns = parts_of(result, "second.weight")
    assert book.shape == (3, 3, 3)  # 8 channels make three stretches, the last filled with zeros
    assert codes.shape == (12, 3, 3, 3)
    assert columns.tolist() == list(range(8))


def test_small_layers_that_gain_nothing_stay_float_and_say_why():
    result = result_of("subspace: 4, words: 64").finish()
    rows = {r.name: r for r in result.ledger}
    assert "4 vectors choose from 64" in rows["head.weight"].why
    assert rows["head.weight"].precision == "float"


def far(model, x, other):
    with torch.no_grad():
        return float((model(x) - other(x)).square().mean())


@pytest.mark.parametrize("groups", [1, 2])
def test_correction_brings_the_outputs_nearer(groups):
    torch.manual_seed(0)
    original = case.small().eval()
    original.second = nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=groups)
    entry = "weights: [second, head], subspace: 4, words: 4"
    x = torch.cat([x for x, _ in case.batches(77)])
    errors = []
    for correct in ("false", "true"):
        model = case.small().eval()
        model.second = nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=groups)
        model.load_state_dict(original.state_dict())
        s = result_of(f"{entry}, correct: {correct}", model)
        errors.append(far(s.finish().model, x, original))
    assert errors[1] < 0.7 * errors[0]


def test_a_later_layer_makes_up_for_an_earlier_one():
    """Equation 13: the responses are of inputs that the quantized layers before give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 40)).eval()
    wanted = [p.detach().clone() for p in model.parameters()]
    x = [torch.randn(60, 6, generator=rng(k)) for k in range(2)]

    def run(weights):
        torch.manual_seed(0)
        again = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 40)).eval()
        text = f"weights: {weights}, subspace: 2, words: 3, correct: true"
        s = case.session(
            f"m: {{quantize: product, {text}, {AT_END}}}", model=again, epochs=0, example=x[0],
            calibration=x,
        )  # fmt: skip
        s.finish()
        return again

    both = run("['0', '1']")
    data = torch.cat(x)
    with torch.no_grad():
        y = F.linear(F.linear(data, wanted[0], wanted[1]), wanted[2], wanted[3])
        apart = F.linear(both[0](data), run("'1'")[1].weight, wanted[3])
        assert (both(data) - y).square().mean() < (apart - y).square().mean()


def test_a_masked_tensor_is_refused():
    few = "few: {prune: oneshot, weights: second, sparsity: 0.6, when: {at: 0ep}}"
    with pytest.raises(BindError, match=r"masks 'second.weight'.*prune: thin"):
        case.trained(few, "m: {quantize: product, weights: second, words: 4, when: {start: 1ep}}")


def test_a_weight_without_input_channels_is_refused():
    with pytest.raises(BindError, match=r"'bn.weight' has no input channels"):
        result_of("weights: bn")


def test_the_size_is_what_codes_and_codebooks_take():
    from gracile.analyze.layers import stored_bytes

    s = result_of("weights: second, subspace: 4, words: 4")
    result = s.finish()
    rest = sum(4 * p.numel() for n, p in result.model.named_parameters() if n != "second.weight")
    codes, book = 12 * 2 * 9 * 2 // 8, 2 * 4 * 4 * 4
    assert stored_bytes(result.model, result.plan) == rest + codes + book
