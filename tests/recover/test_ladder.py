"""The recovery ladder: cheapest first, kept where it does not lose, until enough; the rungs' own
code.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.errors import BindError, RecipeError
from gracile.recipe.load import loads
from gracile.recover.climbing import Rung, climb
from gracile.train.checkpoint import load_state, save_state
from gracile.train.session import Session

G = torch.Generator().manual_seed(5)
X = torch.randn(96, 3, 6, 6, generator=G)
CUT = "cut: {prune: structure, ratio: 0.4, when: {at: end}}"
LADDER = "ladder: {recover: ladder, max_drop: 0"


class Net(nn.Module):
    """Convolutions with and without BatchNorm, a residual sum, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.head((x + F.relu(self.inner(x))).mean((2, 3)))


def net():
    torch.manual_seed(2)
    model = Net()
    with torch.no_grad():
        model(X)  # statistics
        model.bn.momentum = 1.0
        model(X)
        model.bn.momentum = 0.1
        model.eval()
        model.head.bias.sub_(model(X).mean(0))
    return model


def labels():
    with torch.no_grad():
        return net()(X).argmax(1)


def batches():
    y = labels()
    return [(X[i : i + 16], y[i : i + 16]) for i in range(0, len(X), 16)]


def session(methods, *, epochs=0, **changes):
    text = f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods:\n"
    text += "".join(f"  {line}\n" for line in methods.split("\n"))
    model = net()
    data = {"calibration": [X[:32], X[32:48]], "val": batches, "train": batches()} | changes
    return Session(
        model, loads(text, name="r.yaml"),
        torch.optim.SGD(model.parameters(), lr=0.01) if epochs else None,
        example=X[:4], steps_per_epoch=6 if epochs else None,
        loss_of=data.pop("loss_of", F.cross_entropy), **data,
    )  # fmt: skip


def train(s, epoch):
    s.on_epoch_begin(epoch)
    for batch, (x, y) in enumerate(batches()):
        s.on_minibatch_begin(epoch, batch, 6)
        s.model.train()
        loss = s.before_backward_pass(epoch, batch, 6, F.cross_entropy(s.model(x), y))
        s.optimizer.zero_grad()
        loss.backward()
        s.before_parameter_optimization(epoch, batch, 6)
        s.optimizer.step()
        s.on_minibatch_end(epoch, batch, 6)
    s.on_epoch_end(epoch)


def top1(model):
    with torch.no_grad():
        return float((model.eval()(X).argmax(1) == labels()).double().mean())


# ------------------------------------------------------------------ climbing, by hand


class World:
    """A network that is one number, its accuracy in percent."""

    def __init__(self, now):
        self.now, self.time = now, 0.0

    def rung(self, *parts):
        def run():
            for part in parts:
                self.now = part
                self.time += 2.0
                yield 10

        return run

    def climbed(self, rungs, wanted):
        return list(
            climb(
                rungs, self.now, measure=lambda: self.now, hold=lambda: self.now,
                put_back=lambda held: setattr(self, "now", held),
                enough=lambda found: found >= wanted, clock=lambda: self.time,
            )
        )  # fmt: skip


def test_what_loses_is_taken_back_and_the_next_begins_where_the_last_was_kept():
    world = World(50)
    found = world.climbed([("a", world.rung(60)), ("b", world.rung(55)), ("c", world.rung(60))], 90)
    assert found == [
        Rung("a", 2.0, 10, 50, 60, True),
        Rung("b", 2.0, 10, 60, 55, False),
        Rung("c", 2.0, 10, 60, 60, True),  # not lost
    ]
    assert world.now == 60
    assert [r.gain for r in found] == [1000, 0, 0]  # of shares: 100 points are 1


def test_it_ends_with_the_first_rung_that_is_enough():
    world = World(50)
    found = world.climbed([("a", world.rung(60)), ("b", world.rung(95)), ("c", world.rung(99))], 90)
    assert [r.rung for r in found] == ["a", "b"]
    assert world.now == 95
    assert World(95).climbed([("a", world.rung(60))], 90) == []


def test_the_best_part_of_a_rung_stays_and_the_first_that_is_enough_ends_it():
    world = World(50)
    (found,) = world.climbed([("a", world.rung(60, 70, 65))], 90)
    assert (found.after, found.images, world.now) == (70, 30, 70)
    (found,) = World.climbed(world, [("a", world.rung(80, 92, 99))], 90)
    assert (found.after, found.images, world.now) == (92, 20, 92)


def test_a_rung_that_cannot_run_says_why_and_changes_nothing():
    world = World(50)

    def torn():
        world.now = 1
        raise BindError("no such thing")
        yield

    (found,) = world.climbed([("a", torn)], 90)
    assert (found.after, found.kept, found.why, world.now) == (None, False, "no such thing", 50)


# ------------------------------------------------------------------ on a network


def test_every_rung_is_told_and_the_accuracy_never_falls():
    s = session(f"{CUT}\nint8: {{quantize: ptq, bits: 4, weight_bits: 4}}\n{LADDER}, epochs: 3}}")
    result = s.finish()
    (climbed,) = result.ladder
    rungs = climbed["rungs"]
    assert [r["rung"] for r in rungs] == ["batch_norm", "bias", "reconstruct", "layerwise",
                                          "finetune"][: len(rungs)]  # fmt: skip
    assert climbed["dense"] == 1.0
    now = climbed["before"]
    for r in rungs:
        assert r["before"] == now
        assert r["kept"] == (r["after"] >= now)
        now = r["after"] if r["kept"] else now
        assert r["gain"] == pytest.approx(100 * (now - r["before"]))
    assert climbed["after"] == now == top1(result.model)
    assert now > climbed["before"]
    assert [r["images"] for r in rungs[:4]] == [48, 48, 48, 32]  # 0.25 of 6 batches: 2
    assert result.history["ladder/top1"][0][1] == climbed["before"]


def test_within_the_budget_nothing_is_taken():
    with_it = session(f"{CUT}\nladder: {{recover: ladder, max_drop: 100}}").finish()
    without = session(CUT).finish()
    assert with_it.ladder[0]["rungs"] == []
    assert with_it.ladder[0]["met"]
    for name, value in without.model.state_dict().items():
        assert torch.equal(value, with_it.model.state_dict()[name])


def one_rung(name):
    """The result of a ladder of one rung that is never content and always kept."""
    s = session(f"{CUT}\n{LADDER}, rungs: [{name}]}}")
    s.methods[1].dense = 2.0  # never enough
    s.methods[1]._top1 = lambda s, of="present": 0.5  # and no rung loses
    return s.finish()


@pytest.mark.parametrize(("name", "entry"), [
    ("batch_norm", "recover: batch_norm"), ("reconstruct", "recover: reconstruct"),
])  # fmt: skip
def test_a_rung_does_what_the_method_of_its_name_does(name, entry):
    alone = session(f"{CUT}\nladder: {{{entry}, when: {{at: end}}}}").finish()
    mine = one_rung(name)
    for address, value in alone.model.state_dict().items():
        assert torch.equal(value, mine.model.state_dict()[address]), address


def test_fewer_calibration_images_are_those_of_a_method_with_fewer():
    s = session(f"{CUT}\n{LADDER}, rungs: [batch_norm], images: 40}}")
    s.methods[1]._top1 = lambda s, of="present": {"teacher": 2.0}.get(of, 0.5)
    result = s.finish()
    assert result.ladder[0]["rungs"][0]["images"] == 40
    few = session(f"{CUT}\nb: {{recover: batch_norm, when: {{at: end}}}}",
                  calibration=[X[:32], X[32:40]]).finish()  # fmt: skip
    assert torch.equal(result.model.bn.running_var, few.model.bn.running_var)


def test_training_by_a_rung_leaves_the_users_training_alone():
    few = "few: {prune: oneshot, weights: inner, sparsity: 0.5, when: {at: 0ep}}"
    lsq = "l: {quantize: lsq, bits: 4, when: {start: 0ep}}"
    s = session(f"{few}\n{lsq}\n{LADDER}}}", epochs=2)
    train(s, 0)
    lsq, ladder = s.methods[1], s.methods[2]
    grads = {n: p.grad for n, p in s.model.named_parameters()}
    momentum = copy.deepcopy(s.optimizer.state_dict())
    steps = [v for r in lsq.learned.values() for v in r.values.values()]
    were = [v.detach().clone() for v in steps]
    before, drawn = s.hold(), torch.get_rng_state()
    images = sum(s.tune(ladder, ladder.rungs["finetune"], epochs=0.5, lr=0.1))
    assert images == 48
    assert any(not torch.equal(t, old) for t, old in before)
    assert all(p.grad is grads[n] for n, p in s.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    for key, state in s.optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum["state"][key]["momentum_buffer"])
    assert all(torch.equal(v, old) and v.grad is None for v, old in zip(steps, were, strict=True))
    assert torch.all(s.overlays.effective("inner.weight")[~s.mask("inner.weight")] == 0)
    s.put_back(before)
    assert all(torch.equal(t, old) for t, old in before)


def test_in_training_it_climbs_where_something_was_cut_without_training():
    ramp = "{ramp: linear, final: 0.5}, when: {start: 0ep, stop: 2ep}"
    s = session(f"cut: {{prune: structure, ratio: {ramp}}}\n{LADDER}}}", epochs=3)
    for epoch in range(3):
        train(s, epoch)
    result = s.finish()
    *during, last = result.ladder
    assert [c["epoch"] for c in during] in ([0, 1], [1])
    taken = {r["rung"] for c in during for r in c["rungs"]}
    assert taken <= {"batch_norm", "bias", "reconstruct"}
    assert last["epoch"] == 3


def test_killed_in_a_rung_it_ends_as_if_it_was_not(tmp_path):
    recipe = f"{CUT}\n{LADDER}, epochs: 2}}"
    whole = session(recipe, epochs=1)
    train(whole, 0)
    whole = whole.finish()
    s = session(recipe, epochs=1)
    train(s, 0)
    save_state(tmp_path / "s", s.state_dict())
    s.methods[1].rungs["finetune"].on_loss = lambda s: 1 / 0
    with pytest.raises(ZeroDivisionError):
        s.finish()
    again = session(recipe, epochs=1)
    again.load_state_dict(load_state(tmp_path / "s"))
    resumed = again.finish()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for a, b in zip(whole.ladder[0]["rungs"], resumed.ladder[0]["rungs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_what_cannot_be_taken_is_told_with_its_reason():
    s = session(f"{CUT}\n{LADDER}, rungs: [bias, batch_norm]}}")
    rungs = s.finish().ladder[0]["rungs"]
    assert "quantiz" in rungs[0]["why"]
    assert rungs[0]["after"] is None
    assert rungs[1]["why"] == ""


def test_a_missed_budget_is_a_warning_with_what_was_gained():
    s = session(f"{CUT}\n{LADDER}, rungs: [batch_norm]}}")
    s.methods[1].dense = 2.0
    result = s.finish()
    (text,) = [t for c, t in result.warnings if c == "ladder-missed"]
    assert "batch_norm" in text
    assert not result.ladder[0]["met"]


def test_what_it_needs_is_refused_at_bind():
    with pytest.raises(BindError, match="goes by the accuracy on validation data"):
        session(f"{CUT}\n{LADDER}}}", val=None)
    with pytest.raises(BindError, match=r"needs the training data: Session\(\.\.\., train="):
        session(f"{CUT}\n{LADDER}}}", train=None)
    session(f"{CUT}\n{LADDER}, rungs: [batch_norm, reconstruct]}}", train=None)
    with pytest.raises(BindError, match="needs the loss"):
        session(f"{CUT}\n{LADDER}}}", loss_of=None)
    with pytest.raises(BindError, match="recovers from what other entries do"):
        session(f"{LADDER}}}")
    with pytest.raises(BindError, match="'cut' acts after training, behind 'ladder'"):
        session(f"{LADDER}}}\n{CUT}")
    with pytest.raises(BindError, match="none of its rungs is of use here"):
        session(f"{CUT}\n{LADDER}, rungs: [bias]}}")
    with pytest.raises(RecipeError, match="twice"):
        session(f"{CUT}\n{LADDER}, rungs: [bias, bias]}}")
