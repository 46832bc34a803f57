"""Deep Compression end to end: LeNet-300-100 on MNIST, pruned, shared, Huffman coded, read back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gracile
from gracile.core.plan import Architecture
from gracile.models.spec import ModelSpec, architecture_sha
from gracile.train.checkpoint import inspected
from gracile.train.evaluate import predict_module, score
from gracile.train.loop import fit, make_optimizer

METHODS = {
    "sparse": {
        "prune": "gradual",
        "weights": ["fc1", "fc2"],
        "sparsity": {"ramp": "cubic", "initial": 0.3, "final": 0.92},
        "when": {"start": "1ep", "stop": "3ep", "every": "10mb"},
    },
    "shared": {"quantize": "share", "bits": 5, "when": {"start": "4ep"}},
}


class LeNet300(nn.Module):
    """LeCun et al. 1998: 784-300-100-10."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return LeNet300()


def trained(at, methods):
    recipe = gracile.Recipe.build(
        train={
            "epochs": 5,
            "batch_size": 64,
            "optimizer": {"class": "Adam", "lr": 1e-3},
            "augment": "none",
        },
        methods=methods,
    )
    train, example, test = at
    model = lenet()
    s = gracile.Session(
        model, recipe, make_optimizer(model, recipe.train), example=example,
        steps_per_epoch=len(train),
    )  # fmt: skip
    fit(s, train, progress=False)
    result = s.finish()
    return result, score(*predict_module(result.model, test)).top1


@pytest.mark.slow
def test_lenet_300_100_gets_far_smaller_and_as_good(data_dir, tmp_path):
    pytest.importorskip("pyarrow")
    from gracile.data.loader import Loader

    bundle = gracile.open_data(
        f"parquet:{data_dir / 'mnist'}",
        recipe_data={"train": "train[:6000]", "test": "test", "mean": [0.1307], "std": [0.3081]},
    )
    options = {"mean": bundle.mean, "std": bundle.std}
    train = Loader(bundle.train, 64, shuffle=True, **options)
    test = Loader(bundle.test, 500, **options)
    at = (train, next(iter(test))[0][:2], test)
    _, dense = trained(at, {})
    result, top1 = trained(at, METHODS)
    gracile.save_model(tmp_path, result, packed=True)
    found = inspected(tmp_path)
    print(f"dense {dense:.4f} compressed {top1:.4f} {found.weight_bytes} -> {found.file_bytes}")
    assert top1 > dense - 0.01
    assert found.weight_bytes / found.file_bytes > 25
    architecture = Architecture(name="LeNet300", sha256=architecture_sha(lenet()))
    again = gracile.load_model(
        tmp_path, at[1], factory=lambda: ModelSpec(lenet(), architecture, "", "LeCun et al. 1998")
    )
    state = result.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.model.state_dict().items())
