"""Other libraries' networks, tried on small stand-ins: missing, broken, mended, and working."""

import sys

import pytest
import torch

from gracile.errors import MissingExtra, UserError
from gracile.models import adapters
from gracile.models.spec import resolve

MODELS = """
from torch import nn

def list_models():
    return ["resnet18", "vit_b", "maskrcnn_resnet50_fpn"]

def is_model(name):
    return name in list_models()

def get_model(name, weights, num_classes=1000, width=8):
    assert weights is None
    return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes))

def get_model_builder(name):
    def build(*, weights="default", num_classes=1000, width=8):
        return get_model(name, weights, num_classes, width)

    def build_detector(*, weights="default", weights_backbone="default", num_classes=91, width=8):
        assert weights_backbone is None
        return get_model(name, weights, num_classes, width)

    return build_detector if "rcnn" in name else build

def create_model(name, pretrained, num_classes=1000):
    assert pretrained is False
    return get_model(name, None, num_classes)
"""
HALF = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets

"""
TRANSFORMERS = """
from types import SimpleNamespace
import torch

class Net(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.fc = torch.nn.Linear(4, 5)
        self.config = SimpleNamespace(num_labels=5)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.fc(pixel_values.flatten(1)))

class AutoModelForImageClassification:
    @staticmethod
    def from_pretrained(folder, local_files_only, use_safetensors, trust_remote_code):
        assert local_files_only and use_safetensors and not trust_remote_code
        return Net(folder)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put stand-in packages first on the path; what they import is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(package, text):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(text)

    for package in ("torchvision", "timm", "transformers"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("torchvision", "timm", "transformers"):
            del sys.modules[name]
    adapters._mended.clear()


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18"])
def test_a_missing_library_names_its_extra(absent, spec):
    with pytest.raises(
        MissingExtra, match=rf"'{spec}' needs an extra: .*gracile\[{spec.split(':')[0]}"
    ):
        resolve(spec)


def test_torchvision_and_timm_build_without_pretrained_weights(install):
    install("torchvision", "from types import SimpleNamespace\n" + MODELS + (
        "models = SimpleNamespace(list_models=list_models, get_model_builder=get_model_builder)\n"
    ))  # fmt: skip
    install("timm", "import torchvision\n" + MODELS)
    spec = resolve("torchvision:resnet18?width=6", num_classes=3)
    assert spec.model(torch.zeros(2, 6)).shape == (2, 3)
    assert spec.architecture.args == {"width": 6, "num_classes": 3}
    assert resolve("timm:vit_b", num_classes=4).model(torch.zeros(2, 8)).shape == (2, 4)
    for library in ("torchvision", "timm"):
        with pytest.raises(
            UserError, match=f"{library} has no model 'resnet19'. Nearest: 'resnet18'"
        ):
            resolve(f"{library}:resnet19")


def test_a_detector_is_built_without_downloading_its_backbone(install):
    install("torchvision", "from types import SimpleNamespace\n" + MODELS + (
        "models = SimpleNamespace(list_models=list_models, get_model_builder=get_model_builder)\n"
    ))  # fmt: skip
    spec = resolve("torchvision:maskrcnn_resnet50_fpn")
    assert spec.model(torch.zeros(2, 8)).shape == (2, 91)
    assert spec.architecture.args == {}


def test_torchvision_without_its_operators_is_mended(install):
    if hasattr(torch.ops.torchvision, "nms"):
        pytest.fail("a real torchvision is loaded in this test process")
    install("torchvision", HALF + "from types import SimpleNamespace\n" + MODELS + (
        "models = SimpleNamespace(list_models=list_models, get_model_builder=get_model_builder)\n"
    ))  # fmt: skip
    assert resolve("torchvision:resnet18", num_classes=3).model(torch.zeros(1, 8)).shape == (1, 3)
    assert len(adapters._mended) == 1


@pytest.mark.parametrize("error", ["RuntimeError('no libcudart')", "ImportError('no libcudart')"])
def test_a_broken_library_is_one_clear_message(install, error):
    install("timm", f"raise {error}")
    with pytest.raises(
        UserError, match=r"timm is installed but cannot be imported \(.*no libcudart"
    ):
        resolve("timm:resnet18")


def test_a_transformers_folder_maps_tensor_to_logits(install, tmp_path):
    install("transformers", TRANSFORMERS)
    (tmp_path / "config.json").write_text("{}")
    model = resolve(f"hf:{tmp_path}", num_classes=5).model
    assert model(torch.zeros(2, 1, 2, 2)).shape == (2, 5)
    with pytest.raises(UserError, match="was saved with 5 classes, the data has 10"):
        resolve(f"hf:{tmp_path}", num_classes=10)


def test_a_folder_that_is_not_there_is_never_downloaded(tmp_path):
    with pytest.raises(UserError, match=r"must be a local folder with config.json"):
        resolve("hf:google/vit-base-patch16-224")
