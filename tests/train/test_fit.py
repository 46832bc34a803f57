"""The training loop: all hooks, accumulation, mixed precision, and your own DataLoader."""

import copy

import pytest
import torch
import train_case as case
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gracile
from gracile.errors import RecipeError, UserError
from gracile.recipe.schema import Train
from gracile.train.checkpoint import load_state, save_state
from gracile.train.evaluate import predict_module, score
from gracile.train.loop import fit, make_optimizer
from gracile.train.session import Session

EXAMPLE = torch.zeros(2, 3, 8, 8)


def linear(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, case.CLASSES))


def fitted(model, *methods, loader=None, train="{epochs: 3}", **options) -> Session:
    loader = loader or case.Batches()
    recipe = case.recipe(*methods, train=train)
    s = Session(
        model,
        recipe,
        make_optimizer(model, recipe.train),
        example=EXAMPLE,
        steps_per_epoch=len(loader),
        calibration=[x for x, _ in loader],
    )
    fit(s, loader, progress=False, **options)
    return s


class Halves(case.Batches):
    """The same images in batches half as large."""

    def __init__(self):
        super().__init__()
        self.items = [
            part
            for x, y in self.items
            for part in zip(x.split(case.BATCH // 2), y.split(case.BATCH // 2), strict=True)
        ]


def test_accumulated_halves_train_as_whole_batches():
    whole, halves = linear(), linear()
    fitted(whole)
    fitted(halves, loader=Halves(), train="{epochs: 3, accumulate: 2}")
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_computes_in_bf16_keeps_f32_weights_and_stays_close():
    seen = []
    low, high = linear(), linear()
    low[1].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    fitted(low, train="{epochs: 3, autocast: bf16}")
    fitted(high)
    assert set(seen) == {torch.bfloat16}
    assert low[1].weight.dtype == torch.float32
    assert not torch.equal(low[1].weight, high[1].weight)
    torch.testing.assert_close(low[1].weight, high[1].weight, rtol=0, atol=5e-3)  # 2^-8 of 1


def test_a_teacher_and_masks_work_under_bf16():
    s = fitted(case.net(), case.ELEMENTS, case.KD, train="{epochs: 3, autocast: bf16}")
    assert all(v == v for _, v in s.history["loss/kd"])
    assert float((s.finish().model.head.weight == 0).float().mean()) == 0.75


def test_channels_last_changes_the_layout_of_images_and_no_result():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, case.CLASSES))
    other = copy.deepcopy(plain)
    seen = []
    other[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    fitted(plain)
    seen.clear()
    fitted(other, train="{epochs: 3, channels_last: true}")
    assert seen.count(True) == 3 * len(case.Batches())
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_to_the_norm():
    lr, model, before = 0.5, linear(), linear()
    fitted(
        model,
        loader=case.Batches(1),
        train=f"{{epochs: 1, clip_grad_norm: 0.01, optimizer: {{class: SGD, lr: {lr}}}}}",
    )
    moved = [b - a for a, b in zip(before.parameters(), model.parameters(), strict=True)]
    norm = torch.cat([m.flatten() for m in moved]).norm()
    assert norm.item() == pytest.approx(lr * 0.01, rel=1e-3)


def test_label_smoothing_is_in_the_loss():
    x, y = case.Batches().items[0]
    want = F.cross_entropy(linear()(x), y, label_smoothing=0.2)
    s = fitted(linear(), loader=case.Batches(1), train="{epochs: 1, label_smoothing: 0.2}")
    assert s.history["loss/task"][0][1] == pytest.approx(want.item())


def test_the_curves_are_those_of_the_epochs():
    val = case.Batches(2, seed=5)
    s = fitted(case.net(), case.FILTERS, case.THIN, val=lambda: val)
    for name in ("val_top1", "val_loss", "loss/task", "loss/total", "lr"):
        assert [epoch for epoch, _ in s.history[name]] == [1.0, 2.0, 3.0], name
    assert s.history["val_top1"][-1][1] == score(*predict_module(s.model, val)).top1
    # twice masked and once cut, each at an epoch's start
    assert [epoch for epoch, _ in s.history["val_top1_cut"]] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_goes_on_from_a_saved_epoch_ends_the_same(stop, tmp_path):
    methods = (case.FILTERS, case.THIN, case.ELEMENTS, case.KD, case.PTQ)

    def save(epoch):
        if epoch + 1 == stop:
            save_state(tmp_path / "s", sessions[-1].state_dict())

    def fresh():
        model = case.net()
        recipe = case.recipe(*methods)
        sessions.append(
            Session(
                model,
                recipe,
                make_optimizer(model, recipe.train),
                example=EXAMPLE,
                steps_per_epoch=case.STEPS,
                calibration=[x for x, _ in case.Batches()],
            )
        )
        return sessions[-1]

    sessions: list[Session] = []
    fit(fresh(), case.Batches(), after_epoch=save, progress=False)
    fresh().load_state_dict(load_state(tmp_path / "s"))
    torch.manual_seed(99)  # whatever the process drew before
    fit(sessions[1], case.Batches(), start=stop, progress=False)
    a, b = (s.finish() for s in sessions)
    assert a.plan == b.plan
    assert a.history == b.history
    case.assert_same(a.model.state_dict(), b.model.state_dict())


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [("{class: AdamW, lr: 1e-3, weight_decay: 0.1}", "AdamW"), ("{class: SGD, lr: 0.1}", "SGD")],
)
def test_the_optimizer_is_the_recipes(optimizer, kind):
    train = case.recipe(train=f"{{epochs: 1, optimizer: {optimizer}}}").train
    made = make_optimizer(linear(), train)
    assert type(made).__name__ == kind
    for key, value in train.optimizer.arguments.items():
        assert made.defaults[key] == value


def test_an_option_the_optimizer_lacks_is_named():
    train = Train.model_validate({"optimizer": {"class": "SGD", "lr": 0.1}})
    train.optimizer.model_extra["momentun"] = 0.9
    with pytest.raises(RecipeError, match=r"SGD has no 'momentun'\. Nearest: 'momentum'"):
        make_optimizer(linear(), train)


# ------------------------------------------------------------------ gracile.compress, your loader


def loader(**options) -> DataLoader:
    items = case.Batches().items
    data = TensorDataset(torch.cat([x for x, _ in items]), torch.cat([y for _, y in items]))
    own = torch.Generator().manual_seed(0)  # else iterating it would move dropout's numbers
    return DataLoader(data, batch_size=case.BATCH, generator=own, **options)


def test_compress_takes_a_data_loader(tmp_path):
    model = case.net()
    result = gracile.compress(
        model,
        case.recipe(case.FILTERS, case.THIN, case.KD, case.PTQ),
        example=EXAMPLE,
        train=loader(shuffle=True, drop_last=True),
        val=loader(),
    )
    assert result.model(EXAMPLE).shape == (2, case.CLASSES)
    assert len(result.plan.of_kind("remove")) > 0
    assert len(result.plan.of_kind("bits")) > 0
    assert result.model.get_parameter("stem.weight").shape[0] == 4
    assert len(result.history["val_top1"]) == 3
    gracile.save_model(tmp_path, result)
    assert (tmp_path / "model.safetensors").exists()


def test_compress_equals_a_session_over_the_same_batches():
    methods = (case.FILTERS, case.THIN)
    result = gracile.compress(
        case.net(), case.recipe(*methods), example=EXAMPLE, train=loader(shuffle=False)
    )
    other = fitted(case.net(), *methods).finish()
    assert result.plan.edits == other.plan.edits
    case.assert_same(result.model.state_dict(), other.model.state_dict())


def test_compress_without_training_needs_only_calibration_batches():
    result = gracile.compress(
        case.net(),
        case.recipe(case.PTQ, train="{epochs: 0}"),
        example=EXAMPLE,
        calibration=loader(),
    )
    assert len(result.plan.of_kind("bits")) > 0


def test_compress_says_what_is_missing():
    with pytest.raises(UserError, match=r"trains 3 epochs: pass train=<loader>"):
        gracile.compress(case.net(), case.recipe(case.KD), example=EXAMPLE)
    with pytest.raises(UserError, match="must have a length"):
        gracile.compress(
            case.net(), case.recipe(case.KD), example=EXAMPLE, train=iter(case.Batches())
        )
