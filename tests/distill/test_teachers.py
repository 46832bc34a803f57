"""Who teaches: the original, a model with weights, a network by name, several as one."""

import distill_case as case
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from gracile.distill.losses.dkd import dkd
from gracile.distill.losses.mse import mse
from gracile.distill.losses.soft import soft
from gracile.distill.teaching import together
from gracile.errors import BindError, RecipeError, UserError
from gracile.models.spec import resolve
from gracile.recipe.load import loads
from gracile.recipe.teachers import TeacherSpec
from gracile.train.session import Session


def nets(n, seed=10):
    torch.manual_seed(seed)
    return [case.Net(width=4 + k).eval() for k in range(n)]


def first_loss(s, **known):
    x, y = case.data(0)[0]
    s.on_epoch_begin(0)
    logits = s.model.eval()(x).detach()
    hard, total = case.step(s, 0, 0, x, y, train=False, **known)
    return x, logits, hard, total


def test_a_network_by_name_teaches():
    (net,) = nets(1)
    s = case.session("kd: {distill: kd, alpha: 0, teacher: big}", teachers={"big": net})
    x, logits, _, total = first_loss(s)
    torch.testing.assert_close(total, soft(logits, net(x)))
    assert s.teacher is None  # no copy of the original that nobody learns from
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("loss", ["soft", "mse"])
def test_several_answer_as_one(loss):
    a, b = nets(2)
    s = case.session(
        f"kd: {{distill: kd, alpha: 0, temperature: 2, loss: {loss}, teacher: [a, b, original]}}",
        teachers={"a": a, "b": b},
    )
    x, logits, _, total = first_loss(s)
    answers = [net(x).detach() for net in (a, b, s.teacher)]
    if loss == "mse":
        expected = mse(logits, sum(answers) / 3)
    else:
        p = sum(torch.softmax(z / 2, 1) for z in answers) / 3
        q = torch.softmax(logits / 2, 1)
        expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(total, expected)


@given(st.integers(0, 20), st.floats(0.5, 8))
def test_the_ensembles_logits_give_the_mean_probabilities(seed, temperature):
    g = torch.Generator().manual_seed(seed)
    each = [torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(3)]
    got = torch.softmax(together(each, temperature, "probabilities") / temperature, 1)
    wanted = torch.stack([torch.softmax(x / temperature, 1) for x in each]).mean(0)
    torch.testing.assert_close(got, wanted)


def test_dkd_takes_the_labels_of_the_loop():
    (net,) = nets(1)
    s = case.session(
        "kd: {distill: kd, scale: 1, loss: {name: dkd, beta: 2}, teacher: t}", teachers={"t": net}
    )
    x, y = case.data(0)[0]
    x, logits, hard, total = first_loss(s, labels=y)
    torch.testing.assert_close(total, hard + dkd(logits, net(x), y, beta=2.0))


def test_dkd_without_labels_says_how_to_give_them():
    s = case.session("kd: {distill: kd, loss: dkd}")
    with pytest.raises(UserError, match=r"loss dkd needs the labels .* labels=\.\.\."):
        first_loss(s)


def test_images_without_labels_are_learned_from():
    s = case.session("kd: {distill: kd, alpha: 0}")
    s.on_epoch_begin(0)
    s.on_minibatch_begin(0, 0, case.STEPS)
    with torch.no_grad():
        s.parameter("head.bias").add_(torch.tensor([1.0, 0, 0, 0]))
    s.model(case.data(0)[0][0])
    total = s.before_backward_pass(0, 0, case.STEPS, torch.tensor(float("nan")))
    total.backward()
    assert total.item() > 0
    assert s.parameter("head.bias").grad.abs().sum() > 0


# ------------------------------------------------------------------ a model with weights


def resnet(tmp_path, name="t.safetensors", classes=4):
    torch.manual_seed(3)
    model = resolve("resnet20_cifar_a", num_classes=classes).model.eval()
    save_file(model.state_dict(), tmp_path / name)
    return model


def with_teacher(tmp_path, teacher, method="kd: {distill: kd, alpha: 0, teacher: %s}"):
    text = f"recipe: 1\ntrain: {{epochs: 1}}\nmethods:\n  {method % teacher}\n"
    torch.manual_seed(0)
    model = case.Net()
    return Session(
        model,
        loads(text, name=str(tmp_path / "r.yaml")),
        torch.optim.SGD(model.parameters(), lr=0.1),
        example=case.data(99)[0][0],
        steps_per_epoch=case.STEPS,
    )


def test_a_model_with_weights_beside_the_recipe_teaches(tmp_path):
    net = resnet(tmp_path)
    s = with_teacher(tmp_path, "{model: resnet20_cifar_a, weights: t.safetensors}")
    x, logits, _, total = first_loss(s)
    torch.testing.assert_close(total, soft(logits, net(x)))
    (digest,) = s.teachers.files.values()
    assert len(digest) == 64


def test_its_layers_teach_too(tmp_path):
    net = resnet(tmp_path)
    s = with_teacher(
        tmp_path,
        "{model: resnet20_cifar_a, weights: t.safetensors}",
        "f: {distill: features, loss: fitnets, at: {stem: layer1}, teacher: %s}",
    )
    x, _ = case.data(0)[0]
    h = net.layer1(net.relu(net.bn1(net.conv1(x))))
    (pair,) = s.methods[0].pairs
    expected = F.mse_loss(pair.regressor(s.model.stem(x)), h) / 2
    _, _, hard, total = first_loss(s)
    torch.testing.assert_close(total - hard, expected)


def test_building_a_teacher_draws_nothing_from_training(tmp_path):
    resnet(tmp_path)
    s = with_teacher(tmp_path, "original")
    torch.manual_seed(1)
    s.teachers.of(TeacherSpec("resnet20_cifar_a", str(tmp_path / "t.safetensors")))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{model: resnet20_cifar_a, weights: gone.safetensors}", r"gone.safetensors: no such file; "
         "it is looked for beside the recipe"),
        ("{model: resnet20_cifar_a}", r"r.yaml:4: 'kd': .* needs weights, since it is untrained"),
        ("{model: resnet20_cifar_b, weights: t.safetensors}", r"Nearest: 'resnet20_cifar"),
        ("{model: resnet32_cifar_a, weights: t.safetensors}", r"t.safetensors does not fit"),
        ('{model: "resnet20_cifar_a?num_classes=7", weights: seven.safetensors}',
         r"must answer in one shape, got \(6, 4\) and \(6, 7\) of 'resnet20_cifar_a\?num_cl"),
        ("nobody", r"no teacher is called 'nobody'. Known: original"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_teach_is_refused(tmp_path, teacher, message):
    resnet(tmp_path)
    resnet(tmp_path, "seven.safetensors", 7)
    with pytest.raises(UserError, match=message):
        with_teacher(tmp_path, teacher)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{model: net.py:make, weights: t.pt}", r"distill.kd.teacher.model must be no code from"),
        ("{model: a, weight: b}", r"has no key 'weight'. Nearest: 'weights'"),
        ("{weights: b}", r"needs 'model'"),
        ("3", r"must be original or a model, got 3"),
        ("[]", r"at least one teacher"),
        ("[a, a]", r"must not name a teacher twice"),
        ("[a, {model: 3}]", r"teacher.1.model must be a text"),
    ],
)
def test_what_names_no_teacher_is_refused_by_the_recipe(teacher, message):
    with pytest.raises(RecipeError, match=f"^r.yaml:4: .*{message}"):
        case.session(f"kd: {{distill: kd, teacher: {teacher}}}")


def test_a_teacher_for_other_inputs_is_refused():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(10, 4))
    with pytest.raises(
        BindError, match=r"'t' does not run on the student's inputs of shape \(2, 3"
    ):
        case.session("kd: {distill: kd, teacher: t}", teachers={"t": teacher})


def test_the_student_cannot_teach_itself():
    torch.manual_seed(0)
    model = case.Net()
    with pytest.raises(UserError, match="'me' shares parameters with the student; give a copy"):
        Session(
            model,
            case.recipe("kd: {distill: kd, teacher: me}"),
            torch.optim.SGD(model.parameters(), lr=0.1),
            example=case.data(99)[0][0],
            teachers={"me": model},
        )


def test_teachers_survive_yaml():
    text = (
        "recipe: 1\ntrain: {epochs: 1}\nmethods:\n"
        "  a: {distill: kd, teacher: [original, {model: m, weights: w.pt}]}\n"
        "  b: {distill: kd, teacher: {model: hf:folder}}\n  c: {distill: kd}\n"
    )
    r = loads(text, name="r")
    assert loads(r.to_yaml(), name="again") == r
    assert r.methods["a"].options.teacher == ("original", TeacherSpec("m", "w.pt"))
