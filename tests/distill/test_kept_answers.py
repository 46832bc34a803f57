"""Kept answers: the teacher is asked once for each image, and never answers for another picture."""

import distill_case as case
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import gracile
from gracile.data.loader import Loader
from gracile.distill.answers import Answers
from gracile.distill.losses.soft import soft
from gracile.errors import BindError, UserError
from gracile.train.checkpoint import load_state, save_state

KD = "kd: {distill: kd, alpha: 0.5, cache: true}"
IMAGES = torch.randn(case.STEPS * case.BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(len(IMAGES)) % 4


def epoch(s, number, images=IMAGES):
    g = torch.Generator().manual_seed(number)
    s.on_epoch_begin(number)
    for batch, rows in enumerate(torch.randperm(len(IMAGES), generator=g).split(case.BATCH)):
        case.step(s, number, batch, images[rows], LABELS[rows], samples=rows)
    s.on_epoch_end(number)


def test_the_teacher_is_asked_once_for_each_image():
    s = case.session(KD)
    asked = []
    s.teacher.register_forward_hook(lambda _m, args, _o: asked.append(len(args[0])))
    for number in range(3):
        epoch(s, number)
    assert sum(asked) == len(IMAGES)


def test_kept_answers_are_the_teachers_in_half_precision():
    s = case.session(KD, lr=0.0)
    epoch(s, 0)
    x, rows = IMAGES[:6], torch.arange(6)
    s.on_epoch_begin(1)
    s.on_minibatch_begin(1, 0, case.STEPS)
    s.model.eval()
    with torch.no_grad():
        s.parameter("head.bias").add_(torch.tensor([0.5, 0, 0, 0]))
    hard = F.cross_entropy(s.model(x), LABELS[:6])
    total = s.before_backward_pass(1, 0, case.STEPS, hard, samples=rows)
    expected = 0.5 * hard + 0.5 * soft(s.model(x), s.teacher(x).half().float())
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3)


def test_stopped_and_resumed_equals_one_run(tmp_path):
    whole = case.session(KD)
    for number in range(3):
        epoch(whole, number)
    first = case.session(KD)
    epoch(first, 0)
    save_state(tmp_path / "s.safetensors", first.state_dict())
    second = case.session(KD)
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    asked = []
    second.teacher.register_forward_hook(lambda *_: asked.append(1))
    epoch(second, 1)
    epoch(second, 2)
    assert asked == []
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["mirror", "shift", "noise"])
def test_a_picture_that_was_changed_is_refused(change):
    s = case.session(KD)
    epoch(s, 0)
    other = {
        "mirror": IMAGES.flip(3),
        "shift": IMAGES.roll(1, 2),
        "noise": IMAGES + 0.01 * torch.randn(IMAGES.shape),
    }[change]
    with pytest.raises(UserError, match=r"image \d+ is not the picture it was"):
        epoch(s, 1, other)


@given(st.lists(st.permutations(range(7)), min_size=1, max_size=4))
def test_an_image_is_answered_the_same_in_any_order(orders):
    answers, images = Answers(), torch.randn(7, 5)
    wanted = torch.randn(7, 3)
    for order in orders:
        rows = torch.tensor(order)
        got = answers.of(rows, images[rows], lambda rows=rows: wanted[rows])
        assert torch.equal(got, wanted[rows].half().float())


def test_answers_beyond_half_precision_are_refused():
    with pytest.raises(UserError, match="beyond half precision"):
        Answers().of(torch.tensor([0]), torch.ones(1, 2), lambda: torch.tensor([[1e6]]))


@pytest.mark.parametrize(
    "rows", [torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.tensor([0, -1])]
)
def test_what_numbers_no_images_is_refused(rows):
    with pytest.raises(UserError, match="samples must be"):
        Answers().of(rows, torch.ones(2, 2), lambda: torch.ones(2, 1))


def test_a_loop_that_does_not_say_which_images_is_refused():
    s = case.session(KD)
    with pytest.raises(UserError, match=r"'kd': cache keeps .* samples=<numbers>"):
        case.train_epoch(s, 0)


def test_a_loader_that_changes_pictures_is_refused_before_training():
    with pytest.raises(BindError, match=r"r.yaml:4: 'kd': cache .*\{augment: none\}"):
        case.session(KD, numbered=False)
    with pytest.raises(BindError, match="cache"):
        gracile.compress(
            case.Net(), case.recipe(KD), example=case.data(9)[0][0], train=case.data(0)
        )


def test_the_loader_says_which_images_its_batches_have():
    images = _Rows()
    options = {"mean": (0.0,), "std": (1 / 255,), "seed": 3, "shuffle": True}
    loader = Loader(images, 4, **options)
    for number in range(2):
        for rows, (x, y) in zip(loader.samples(number), loader.batches(number), strict=True):
            assert torch.equal(x[:, 0, 0, 0].round().long(), rows)
            assert torch.equal(y, rows % 3)
    assert Loader(images, 4, augment="shift", **options).samples(0) is None
    parts = [Loader(images, 4, rank=r, world=2, **options).samples(0) for r in range(2)]
    assert sorted(torch.cat([*parts[0], *parts[1]]).tolist()) == list(range(10))


class _Rows:
    """Ten pictures of one pixel, as bright as their number."""

    labels = torch.arange(10) % 3

    def __len__(self):
        return 10

    def images(self, rows):
        return rows.to(torch.uint8).view(-1, 1, 1, 1)
