"""From a specification to a network, and every way to get it wrong."""

import pytest
import torch
from torch import nn

from gracile.core.plan import Architecture
from gracile.errors import UserError
from gracile.models.spec import architecture_sha, registered, resolve

NET = """
import torch
from blocks import width
from torch import nn

READY = nn.Linear(3, 2)
NUMBER = 7

def make(num_classes=10, depth: int = 1):
    import late
    body = [nn.Linear(width, width) for _ in range(depth)]
    return nn.Sequential(*body, nn.Linear(width, num_classes))

def needs(depth):
    return nn.Linear(depth, 1)

def fails():
    raise KeyError("no luck")

def wrong():
    return "net"

class Net(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.fc = nn.Linear(2, num_classes)
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "blocks.py").write_text("width = 5\n")
    (tmp_path / "late.py").write_text("")
    return tmp_path / "net.py"


def test_arguments_are_typed_as_yaml():
    spec = resolve("mobilenet_v2?width_mult=0.25&small_images=true&num_classes=5&dropout=1e-1")
    assert spec.architecture.args == {
        "width_mult": 0.25,
        "small_images": True,
        "num_classes": 5,
        "dropout": 0.1,
    }
    assert spec.architecture.name == "mobilenet_v2"


def test_classes_come_from_the_data_unless_given():
    assert resolve("resnet20_cifar", num_classes=3).model.fc.out_features == 3
    assert resolve("resnet20_cifar?num_classes=4", num_classes=3).model.fc.out_features == 4


def test_a_saved_architecture_builds_the_same_network():
    first = resolve("resnet20_cifar_a?in_channels=1", num_classes=6).architecture
    again = registered(Architecture.model_validate_json(first.model_dump_json()))
    assert again.architecture == first


def test_sha_sees_shapes_and_names_but_not_values():
    sha = architecture_sha(nn.Linear(2, 3))
    assert sha == architecture_sha(nn.Linear(2, 3))
    assert sha != architecture_sha(nn.Linear(3, 2))
    assert sha != architecture_sha(nn.Sequential(nn.Linear(2, 3)))
    assert len(sha) == 64


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet20_cifa", "unknown model 'resnet20_cifa'. Nearest: 'resnet20_cifar"),
        ("resnet20_cifar?num_clases=3", "no argument 'num_clases'. Nearest: 'num_classes'"),
        ("resnet20_cifar?num_classes", r"\?key=value&key=value: 'num_classes'"),
        ("resnet20_cifar?num_classes=3&num_classes=4", "'num_classes' is given twice"),
        ("mobilenet_v2?width_mult=-1", "could not be built: ValueError: width_mult must be > 0"),
        ("keras:resnet50", "'keras' is no source of models; write a registered name"),
        ("net.py", r"Write net.py:FACTORY"),
        ("torchvision:", "write torchvision:NAME"),
    ],
)
def test_errors_name_the_rule_and_the_value(spec, message):
    with pytest.raises(UserError, match=message):
        resolve(spec)


def test_two_values_for_one_argument_are_refused():
    with pytest.raises(UserError, match="also given as 5; keep one"):
        resolve("resnet20_cifar?num_classes=4", args={"num_classes": 5})


def test_a_factory_of_the_users_file_with_arguments(net):
    spec = resolve(f"{net}:make?depth=3", num_classes=2)
    assert len(spec.model) == 4
    assert spec.model(torch.zeros(1, 5)).shape == (1, 2)
    assert spec.architecture.args == {"depth": 3, "num_classes": 2}
    assert spec.architecture.name == f"{net}:make"


def test_a_class_or_a_ready_network_will_do(net):
    assert resolve(f"{net}:Net", num_classes=9).model.fc.out_features == 9
    assert resolve(f"{net}:READY", num_classes=9).model.out_features == 2


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("mak", r"has no 'mak'. Nearest: 'make'"),
        ("NUMBER", "must be a function or class that returns a network: int"),
        ("needs", r"needs the argument 'depth': write .*needs\?depth=VALUE"),
        ("fails", r"could not be built: .*net.py:18: KeyError: 'no luck'"),
        ("wrong", "must return an nn.Module, got str"),
        ("READY?depth=2", "no argument 'depth'. It takes none"),
    ],
)
def test_faults_in_the_users_file_are_placed(net, factory, message):
    with pytest.raises(UserError, match=message):
        resolve(f"{net}:{factory}")


def test_a_missing_file_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"nope.py: no such file \\(looked in {tmp_path}\\)"):
        resolve("nope.py:make")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x = 1\nimport not_there\n",
            "broken.py:2: ModuleNotFoundError: No module named 'not_there'",
        ),
        ("def make(:\n", "broken.py:1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "broken.py:2: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_imported_names_the_line(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(f"{tmp_path / 'broken.py'}:make")


def test_a_saved_plan_runs_no_file(net):
    with pytest.raises(UserError, match="only if you name the file yourself"):
        registered(Architecture(name=f"{net}:make"))
