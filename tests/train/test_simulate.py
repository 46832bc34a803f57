"""A simulated recipe: levels, cuts and rates by hand, the same as in training, in seconds."""

import time

import pytest
import torch
import train_case as case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gracile.analyze.cost import cost
from gracile.errors import BindError, UserError
from gracile.models.spec import resolve
from gracile.recipe.load import loads
from gracile.train.counting import count
from gracile.train.simulate import simulate

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
STEM, INNER, OUTER, HEAD = 8 * 27, 12 * 72, 8 * 108, 32  # weights of train_case.Net
WEIGHTS = STEM + INNER + OUTER + HEAD
PARAMS = WEIGHTS + 12 + 4 + 2 * 8 + 2 * 12  # biases and BatchNorms
MACS = 64 * (STEM + INNER + OUTER) + HEAD  # 8x8 positions
HALF = "half: {prune: oneshot, weights: inner, granularity: filter, sparsity: 0.5, when: {at: 1ep}}"


def run(*methods, model=None, steps=case.STEPS, epochs=case.EPOCHS, train="", **options):
    train = train or f"{{epochs: {epochs}}}"
    return simulate(
        case.recipe(*methods, train=train),
        model or case.net(),
        example=X,
        steps_per_epoch=steps,
        **options,
    )


def codes(found) -> list[str]:
    return [code for code, _ in found.warnings]


def test_agp_levels_and_zeros_by_hand():
    agp = (
        'agp: {prune: gradual, weights: "type:Conv2d", '
        "sparsity: {ramp: cubic, initial: 0.1, final: 0.5}, when: {start: 0ep, stop: 3ep}}"
    )
    found = run(agp, epochs=4)
    fired = [[(f.id, f.times, f.levels["sparsity"]) for f in m.fired] for m in found.epochs]
    # 0.5 + (0.1 - 0.5) (1 - p)^3 at p = 0, 1/2, 1
    levels = [pytest.approx(level) for level in (0.1, 0.45, 0.5)]
    assert fired == [*([("agp", 1, level)] for level in levels), []]
    zeros = [21 + 2 * 86, 97 + 2 * 388, 108 + 2 * 432, 108 + 2 * 432]  # floor(level * n) of each
    assert [PARAMS - m.count.nnz for m in found.epochs] == zeros
    assert [m.count.sparsity for m in found.epochs] == [z / WEIGHTS for z in zeros]
    assert [m.count.macs_nonzero for m in found.epochs] == [MACS - 64 * z for z in zeros]
    assert found.before.nnz == found.before.params == PARAMS
    assert found.totals == {
        "params": PARAMS,
        "nnz": PARAMS - 972,
        "macs_before": MACS,
        "macs_after": MACS,
    }


def test_two_methods_fire_in_mid_epoch_and_their_zeros_add_up():
    found = run(
        "a: {prune: oneshot, weights: head, sparsity: 0.75, when: {at: 5mb}}",
        "b: {prune: gradual, weights: stem, sparsity: {ramp: linear, final: 0.5}, "
        "when: {start: 1ep, stop: 3ep, every: 2mb}}",
        epochs=4,
    )
    told = [[(f.id, f.method, f.times, f.progress) for f in m.fired] for m in found.epochs]
    assert told == [
        [],
        [("a", "prune: oneshot", 1, 1.0), ("b", "prune: gradual", 2, 1 / 3)],
        [("b", "prune: gradual", 2, 1.0)],
        [],
    ]
    assert [PARAMS - m.count.nnz for m in found.epochs] == [0, 24 + 36, 24 + 108, 24 + 108]


def test_thinning_takes_parameters_and_macs_from_its_epoch_on():
    found = run(HALF, case.THIN)
    left = PARAMS - 6 * 72 - 6 - 2 * 6 - 8 * 6 * 9  # 6 filters: weights, bias, BatchNorm, readers
    assert [m.count.params for m in found.epochs] == [PARAMS, PARAMS, left]
    assert [m.count.nnz for m in found.epochs] == [PARAMS, left, left]
    assert [m.count.macs for m in found.epochs] == [MACS, MACS, MACS - 64 * (432 + 432)]
    assert found.epochs[1].count.macs_nonzero == found.epochs[2].count.macs
    assert found.end.count == found.epochs[2].count
    assert found.totals["macs_after"] == MACS - 64 * 864


def test_what_fires_at_the_end_is_told_after_the_epochs():
    found = run(HALF, "thin: {prune: thin, when: {at: end}}")
    assert [f.id for f in found.end.fired] == ["thin"]
    assert found.end.count.params < found.epochs[-1].count.params
    assert (found.end.epoch, found.end.learning_rate) == (None, None)


def test_a_recipe_without_training_has_only_its_end():
    found = run("e: {prune: oneshot, weights: head, sparsity: 0.5, when: {at: end}}", epochs=0)
    assert found.epochs == ()
    assert PARAMS - found.end.count.nnz == 16


@settings(max_examples=20)
@given(st.floats(0, 0.99), st.integers(1, 5), st.integers(1, 9))
def test_any_ramp_ends_at_its_level_however_long_training_is(level, epochs, steps):
    entry = (
        f"m: {{prune: gradual, weights: head, sparsity: {{ramp: linear, final: {level!r}}}, "
        "when: {start: 0ep, every: 2mb}}"
    )
    found = run(entry, epochs=epochs, steps=steps)
    zeros = [PARAMS - m.count.nnz for m in found.epochs]
    assert zeros == sorted(zeros)
    assert zeros[-1] == int(level * HEAD + 1e-6)
    assert sum(f.times for m in found.epochs for f in m.fired) == -(-epochs * steps // 2)


def test_step_lr_by_hand():
    train = (
        "{epochs: 5, optimizer: {class: SGD, lr: 0.8}, "
        "lr: {class: StepLR, step_size: 2, gamma: 0.5}}"
    )
    rates = [m.learning_rate for m in run(train=train).epochs]
    assert rates == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2])


def test_a_plateau_is_not_guessed():
    found = run(train="{epochs: 9, lr: {class: ReduceLROnPlateau, metric: val_top1, patience: 1}}")
    assert [m.learning_rate for m in found.epochs] == [0.01] * 9
    assert codes(found) == ["not-simulated"]


@pytest.mark.parametrize(
    "methods",
    [
        (case.FILTERS, case.THIN, case.ELEMENTS),
        (
            'drop: {prune: drop, weights: "type:Conv2d", sparsity: 0.25, choose: random, '
            "lifetime: span, when: {start: 0ep, stop: 6mb, every: 2mb}}",
        ),
        ("cut: {prune: structure, ratio: 0.3, scope: layer, when: {at: 1ep}}", case.KD),
        (
            'l: {prune: lottery, weights: "type:Conv2d", sparsity: 0.3, rewind_to: 2mb, '
            "when: {start: 1ep, every: 2mb}}",
        ),
    ],
    ids=["filters", "drop", "structure", "lottery"],
)
def test_it_counts_what_a_real_training_leaves(methods):
    train = "{epochs: 3, lr: {class: OneCycleLR, max_lr: 0.2}}"
    s, seen, rates = case.session(*methods, train=train), [], []
    begin, end = s.on_minibatch_begin, s.on_epoch_end

    def watch_begin(epoch, batch, steps):
        begin(epoch, batch, steps)
        if batch == 0:
            rates.append(s.optimizer.param_groups[0]["lr"])

    def watch_end(epoch, metrics=None):
        end(epoch, metrics)
        seen.append((dict(s.fired), count(s, cost(s.model, s.graph), strict=False)))

    s.on_minibatch_begin, s.on_epoch_end = watch_begin, watch_end
    case.by_callbacks(s)
    optimizer = "{class: SGD, lr: 0.05, momentum: 0.9}"
    found = run(*methods, train=train.replace("{epochs: 3", f"{{epochs: 3, optimizer: {optimizer}"))
    assert [m.count for m in found.epochs] == [c for _, c in seen]
    assert [m.learning_rate for m in found.epochs] == rates
    told = {id: sum(f.times for m in found.epochs for f in m.fired if f.id == id) for id in s.fired}
    assert told == seen[-1][0]


# ------------------------------------------------------------------ what it cannot know


def test_random_data_is_used_and_told_where_a_criterion_asks_for_it():
    entry = "m: {{prune: oneshot, weights: head, criterion: {}, sparsity: 0.5, when: {{at: 1ep}}}}"
    assert codes(run(entry.format("l1"))) == []
    for name in ("taylor", "apoz"):
        found = run(entry.format(name))
        assert codes(found) == ["random-data"]
        assert found.end.count.nnz == PARAMS - 16
    batches = [(X, torch.tensor([0, 1]))]
    assert codes(run(entry.format("taylor"), calibration=batches)) == []


@pytest.mark.parametrize(
    ("entry", "times"),
    [
        (case.KD, 0),
        (case.PTQ, 1),
        ('m: {regularize: penalty, weights: "**.weight", penalty: l1, strength: 1e-4}', 0),
        ("m: {prune: gates, weights: inner, sparsity: 0.9, when: {start: 0ep}}", 3),
        ("m: {recover: batch_norm, when: {at: end}}", 1),
    ],
    ids=["kd", "ptq", "penalty", "gates", "batch_norm"],
)
def test_what_needs_training_is_listed_and_named_and_changes_nothing(entry, times):
    found = run(entry)
    moments = [*found.epochs, found.end]
    assert sum(f.times for m in moments for f in m.fired) == times
    assert {f.id for m in moments for f in m.fired} == set(found.not_simulated)
    assert codes(found) == ["not-simulated"]  # no target-missed of gates that were never trained
    assert all(m.count == found.before for m in moments)


def test_what_acts_all_the_time_is_told_in_every_epoch():
    found = run(HALF, case.KD, epochs=2)
    told = [[(f.id, f.times) for f in m.fired] for m in (*found.epochs, found.end)]
    assert told == [[("kd", 0)], [("half", 1), ("kd", 0)], []]


def test_a_threshold_goes_by_the_weights_it_is_given():
    model = case.net()
    with torch.no_grad():
        model.stem.weight.fill_(1.0)[0] = 0.1
    entry = "m: {prune: threshold, weights: stem, threshold: 0.5, when: {at: 0ep}}"
    found = run(entry, model=model)
    assert PARAMS - found.end.count.nnz == 27
    assert codes(found) == ["depends-on-weights"]


def test_layers_ranked_together_depend_on_the_weights():
    entry = (
        'm: {{prune: oneshot, weights: "**.weight", scope: {}, sparsity: 0.5, when: {{at: end}}}}'
    )
    assert codes(run(entry.format("global"))) == ["depends-on-weights"]
    assert codes(run(entry.format("layer"))) == []


# ------------------------------------------------------------------ where it brings no speed


def test_zeros_and_masked_channels_bring_no_speed():
    found = run(HALF, case.ELEMENTS, runtimes=["openvino", "pytorch:CPU"])
    assert codes(found) == ["channels-not-cut", "zeros-no-speed"] * 2
    texts = [text for _, text in found.warnings]
    assert texts[0].startswith("openvino computes 6 channels")
    assert texts[1].startswith(f"{100 * 24 / WEIGHTS:.1f} % of the weights are masked in no whole")
    assert texts[2].startswith("pytorch computes 6 channels")


def test_cut_channels_bring_speed_in_multiples_of_16():
    found = run(HALF, case.THIN, runtimes=["openvino", "pytorch"])
    assert codes(found) == ["uneven-widths"]
    assert "1 convolutions were cut" in found.warnings[0][1]
    assert "inner.weight: 6" in found.warnings[0][1]
    wide = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    half = HALF.replace("inner", '"0"')
    assert codes(run(half, case.THIN, model=wide, runtimes=["onnxruntime"])) == []


def test_without_a_runtime_nothing_is_said_about_speed():
    assert codes(run(HALF, case.ELEMENTS)) == []


# ------------------------------------------------------------------ as Distiller counts


class Tied(nn.Module):
    """3 x 4 x 4: a convolution, and one linear layer applied twice to its 16 positions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(self.norm(self.conv(x)).flatten(2).transpose(1, 2)))


def test_strict_counts_as_distiller_does():
    def end(compat):
        entry = "{prune: oneshot, weights: a, sparsity: 0.2, when: {at: end}}"
        recipe = loads(f"recipe: 1\ncompat: {compat}\nmethods: {{m: {entry}}}\n")
        return simulate(recipe, Tied(), example=torch.randn(2, 3, 4, 4)).end.count

    ours, theirs = end("none"), end("strict")
    assert (ours.params, ours.nnz) == (135 + 5 + 10 + 25 + 5, 180 - 5)
    assert ours.sparsity == 5 / 160
    assert (ours.macs, ours.macs_nonzero) == (16 * 135 + 2 * 16 * 25, 16 * 135 + 2 * 16 * 20)
    # 2-D and 4-D only, the tied weight under both names, a linear layer once whatever its positions
    assert (theirs.params, theirs.nnz) == (135 + 2 * 25, 185 - 2 * 5)
    assert theirs.sparsity == 10 / 185
    assert (theirs.macs, theirs.macs_nonzero) == (16 * 135 + 2 * 25, 16 * 135 + 2 * 20)


# ------------------------------------------------------------------ errors, inputs, speed


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="unknown runtime 'openvin'"):
        run(HALF, runtimes=["openvin"])
    with pytest.raises(BindError, match="never fires"):
        run(HALF, epochs=1)
    with pytest.raises(BindError, match="matches no tensor"):
        run(HALF.replace("inner", "iner"))


def test_index_inputs_are_shuffled_and_not_replaced():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, x):
            return self.out(self.table(x))

    recipe = case.recipe(
        "m: {prune: oneshot, weights: out, criterion: taylor, sparsity: 0.5, when: {at: 1ep}}"
    )
    found = simulate(recipe, Words(), example=torch.tensor([[6, 0, 3], [1, 2, 6]]))
    assert found.before.params - found.end.count.nnz == 14


def test_days_of_training_take_seconds():
    recipe = loads(
        """
recipe: 1
train: {epochs: 200, lr: {class: StepLR, step_size: 60}}
methods:
  agp: {prune: gradual, weights: "type:Conv2d", sparsity: {ramp: cubic, final: 0.8},
        when: {start: 0ep, stop: 100ep, every: 4ep}}
"""
    )
    model = resolve("resnet56_cifar_a").model
    start = time.process_time()
    found = simulate(recipe, model, example=torch.randn(2, 3, 32, 32), steps_per_epoch=390)
    assert time.process_time() - start < 10
    assert len(found.epochs) == 200
    assert sum(f.times for m in found.epochs for f in m.fired) == 25
    convolutions = [p for p in model.parameters() if p.dim() == 4]
    assert found.before.nnz - found.end.count.nnz == sum(int(0.8 * p.numel()) for p in convolutions)
