"""Scripts with the steps of the NNCF paper's appendix, on a small network."""

import copy
import warnings

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gracile.benchmark.processor import sums_saturate
from gracile.compat.nncf import create_compression_algorithm as create_cm_algo
from gracile.compat.nncf import patch_torch_operators
from gracile.errors import GracileError, UserError
from gracile.train.session import Session

STEPS, SHAPE = 3, [2, 3, 8, 8]
MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.1,
    "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 3},
}
RB = {
    "algorithm": "rb_sparsity",
    "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 9},
}
KD = {"algorithm": "knowledge_distillation", "type": "softmax", "scale": 3, "temperature": 2}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.pool(x).flatten(1))


def batches():
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g))
        for _ in range(STEPS)
    ]


def quietly_created(model, *algorithms, **root):
    config = {"input_info": {"sample_size": SHAPE}, "compression": list(algorithms), **root}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is different from NNCF
        return create_cm_algo(model, config)


def script(compression_algo, train_loader, epochs, make_optimizer=torch.optim.SGD, lr=0.05):
    """Steps 2 to 7 of the appendix; yields after each epoch."""
    model = compression_algo.model
    compression_algo.distributed()
    compression_algo.initialize(train_loader)
    optimizer = make_optimizer(model.parameters(), lr=lr)
    for _ in range(epochs):
        model.train()
        for x, y in train_loader:
            cross_entropy_loss = cross_entropy(model(x), y)
            compress_loss = compression_algo.loss()
            loss = cross_entropy_loss + compress_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            compression_algo.scheduler.step()
        compression_algo.scheduler.epoch_step()
        yield float(loss.detach())


def test_magnitude_sparsity_with_quantization(tmp_path):
    patch_torch_operators.cache_clear()
    with pytest.warns(UserWarning, match="does nothing here"):
        patch_torch_operators()
    patch_torch_operators()  # says nothing any more
    torch.manual_seed(0)
    net, loader = Net(), batches()
    adapt = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 16}}}
    quantization = {"algorithm": "quantization", **adapt, "ignored_scopes": ["Net/NNCFLinear[fc]"]}
    algorithm = quietly_created(net, MAGNITUDE, quantization, epochs=4)
    model = algorithm.model
    levels = [
        algorithm.statistics()["levels"]["sparsity/magnitude_sparsity"]
        for _ in script(algorithm, loader, 4)
    ]
    assert algorithm.model is model
    # 0.6 - 0.5 (1 - e/2)^0.9, set after each epoch for the one that follows
    assert levels == pytest.approx([0.6 - 0.5 * 0.5**0.9, 0.6, 0.6, 0.6])
    algorithm.export_model(tmp_path / "net.onnx")
    zeros = algorithm.statistics()["sparsity"]
    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    total = sum(p.numel() for p in weights.values())
    assert sum(zeros[n] * p.numel() for n, p in weights.items()) / total >= 0.59
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (name,) = (i.name for i in session.get_inputs())
    got = session.run(None, {name: loader[0][0].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), model.eval()(loader[0][0]), atol=0.05, rtol=0)
    assert {e.bits for e in algorithm.result.plan.of_kind("bits")} == {8, 8 - sums_saturate()}
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_rb_sparsity(tmp_path):
    torch.manual_seed(0)
    config = {**RB, "compression_lr_multiplier": 1.0}
    optimizer = {"type": "Adam", "base_lr": 0.5, "schedule_type": "step"}
    algorithm = quietly_created(Net(), config, epochs=12, optimizer=optimizer)
    terms = []
    for _ in script(algorithm, batches(), 12, torch.optim.Adam, 0.01):
        terms.append(algorithm.statistics()["loss"]["rb_sparsity"])
    assert max(terms) > 0
    algorithm.export_model(tmp_path / "net.onnx")
    closed = [v.sparsity for v in algorithm.result.plan.of_kind("mask")]
    assert len(closed) == 3
    assert sum(closed) / 3 == pytest.approx(0.5, abs=0.2)


def test_the_gradient_of_rb_sparsity_reaches_its_gates():
    torch.manual_seed(0)
    algorithm = quietly_created(Net(), RB, epochs=12)
    run = script(algorithm, batches(), 3)
    next(run)
    gates = algorithm.session.methods[0].gates
    before = {a: g.logits.detach().clone() for a, g in gates.items()}
    next(run)
    assert all(not torch.equal(before[a], g.logits) for a, g in gates.items())


def test_distillation_adds_scale_times_its_loss():
    torch.manual_seed(0)
    net, loader = Net(), batches()
    algorithm = quietly_created(net, KD, epochs=1)
    algorithm.initialize(loader)
    teacher = algorithm.session.teacher
    with torch.no_grad():
        net.fc.bias += torch.arange(4.0)
    model = algorithm.model.train()
    out, (x, _) = model(loader[0][0]), loader[0]
    with torch.no_grad():
        p = (teacher(x) / 2).log_softmax(1)
    q = (out / 2).log_softmax(1)
    expected = 3 * 2**2 * (p.exp() * (p - q)).sum(1).mean()  # scale T^2 KL
    torch.testing.assert_close(algorithm.loss(), expected)
    algorithm.loss().backward()
    assert net.fc.bias.grad is not None


def test_the_terms_of_several_algorithms_add_up():
    torch.manual_seed(0)
    algorithm = quietly_created(Net(), RB, KD, epochs=12)
    algorithm.initialize(batches())
    algorithm.model(batches()[0][0])
    total, s = algorithm.loss(), algorithm.session
    gates = s.methods[0].on_loss(s)["rb_sparsity"]
    soft = s.methods[1].on_loss(s)["knowledge_distillation"]
    torch.testing.assert_close(total, gates + soft)


def test_filters_are_cut_when_the_model_is_exported(tmp_path):
    params = {"pruning_steps": 2, "prune_first_conv": True, "filter_importance": "L1"}
    algorithm = quietly_created(Net(), {"algorithm": "filter_pruning", "params": params}, epochs=3)
    list(script(algorithm, batches(), 3))
    algorithm.export_model(tmp_path / "net.onnx")
    assert algorithm.model.module.conv1.out_channels == 4
    assert algorithm.model(batches()[0][0]).shape == (8, 4)


def test_a_flops_target_needs_the_optimizer_and_follows_it():
    params = {"pruning_flops_target": 0.3, "pruning_steps": 2, "prune_first_conv": True}
    pruning = {"algorithm": "filter_pruning", "params": params}
    with pytest.raises(UserError, match=r"set algorithm\.optimizer = optimizer"):
        quietly_created(Net(), pruning, epochs=3).initialize(batches())
    algorithm = quietly_created(Net(), pruning, epochs=3)
    algorithm.optimizer = torch.optim.SGD(algorithm.model.parameters(), lr=0.1, momentum=0.9)
    list(script(algorithm, batches(), 3, lambda _parameters, lr: algorithm.optimizer))
    momentum = algorithm.optimizer.state[algorithm.model.module.conv2.weight]["momentum_buffer"]
    assert momentum.shape == algorithm.model.module.conv2.weight.shape
    assert len(momentum) < 8


def test_a_learned_ranking_needs_the_optimizer_and_the_loss():
    search = {"generations": 3, "train_steps": 1}
    params = {"pruning_flops_target": 0.3, "pruning_steps": 2, "prune_first_conv": True}
    params |= {"interlayer_ranking_type": "learned_ranking", "all_weights": True}
    pruning = {"algorithm": "filter_pruning", "params": {**params, "legr_params": search}}
    algorithm = quietly_created(Net(), pruning, epochs=3)
    with pytest.raises(UserError, match=r"^learned_ranking .* set algorithm\.optimizer = "):
        algorithm.initialize(batches())
    algorithm.optimizer = torch.optim.SGD(algorithm.model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"^learned_ranking .* set algorithm\.loss_of = "):
        algorithm.initialize(batches())
    algorithm.loss_of = cross_entropy
    list(script(algorithm, batches(), 3, lambda _parameters, lr: algorithm.optimizer))
    assert len(algorithm.model.module.conv1.weight) + len(algorithm.model.module.conv2.weight) < 16


def test_the_loss_is_0_where_nothing_is_to_be_added():
    algorithm = quietly_created(Net(), MAGNITUDE, epochs=4)
    algorithm.initialize(batches())
    algorithm.model(batches()[0][0])
    assert float(algorithm.loss()) == 0


def test_each_difference_from_nncf_is_a_warning():
    with pytest.warns(UserWarning, match=r"<nncf config>: the configuration has no 'epochs'"):
        create_cm_algo(Net(), {"compression": RB})


def test_the_input_is_the_loaders_where_no_input_info_is():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        algorithm = create_cm_algo(Net(), {"compression": MAGNITUDE}, epochs=4)
    algorithm.initialize(batches())
    torch.testing.assert_close(algorithm.session.example, batches()[0][0][:2])


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda a: a.loss(), "call initialize"),
        (lambda a: a.scheduler.step(), "call initialize"),
        (lambda a: a.initialize(iter(batches())), "a loader with a length"),
    ],
)
def test_calls_out_of_order_say_what_is_missing(do, message):
    with pytest.raises(UserError, match=message):
        do(quietly_created(Net(), MAGNITUDE, epochs=4))


def test_too_many_iterations_or_too_few_epochs_are_refused(tmp_path):
    algorithm = quietly_created(Net(), MAGNITUDE, epochs=4)
    algorithm.initialize(batches())
    for _ in range(STEPS):
        algorithm.scheduler.step()
    with pytest.raises(UserError, match=r"call scheduler\.epoch_step\(\) after each epoch"):
        algorithm.scheduler.step()
    algorithm.scheduler.epoch_step()
    with pytest.raises(GracileError, match="fired 2 of 3 times"):
        algorithm.export_model(tmp_path / "net.onnx")


def test_optimizers_made_before_stay_valid_when_the_network_is_replaced():
    torch.manual_seed(0)
    algorithm = quietly_created(Net(), {"algorithm": "quantization"}, epochs=2)
    model = algorithm.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.module
    algorithm.initialize(batches())
    assert model.module is not before
    weight = before.conv1.weight.detach().clone()
    x, y = batches()[0]
    cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(weight, model.module.get_parameter("conv1.weight"))


@pytest.mark.parametrize("algorithms", [[RB, {"algorithm": "quantization"}], [MAGNITUDE]])
def test_the_script_trains_as_the_sessions_own_loop_does(algorithms):
    torch.manual_seed(0)
    net, loader = Net(), batches()
    own = copy.deepcopy(net)
    algorithm = quietly_created(net, *algorithms, epochs=12)
    list(script(algorithm, loader, 12))
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    session = Session(
        own,
        algorithm.recipe,
        optimizer,
        example=algorithm.session.example,
        steps_per_epoch=STEPS,
        calibration=loader,
    )
    for _ in range(12):
        with session.epoch():
            for x, y in loader:
                session.model.train()
                session.loss(cross_entropy(session.model(x), y)).backward()
                session.step()
    mine, its = algorithm.result, session.finish()
    assert mine.plan.edits == its.plan.edits
    for name, tensor in its.model.state_dict().items():
        torch.testing.assert_close(mine.model.state_dict()[name], tensor, rtol=0, atol=0)
