"""Small networks with the patterns of well-known ones, from cut to artifact.

As a script (`small_architectures.py NAME FOLDER`) it is the second half of the way: a process that
knows nothing but the files in FOLDER.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import gracile
from gracile.core.plan import Architecture
from gracile.core.result import Result
from gracile.models.spec import ModelSpec, architecture_sha, resolve
from gracile.recipe.build import build, quantize

RUNTIMES = ("onnxruntime", "openvino")
WORDS = 30


def conv(narrow, wide, kernel=3, stride=1, groups=1, act=nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(narrow, wide, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(wide),
        act(),
    )


class Classifier(nn.Module):
    """Mean over the pixels, then a linear layer."""

    def __init__(self, *body, width):
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Excited(nn.Module):
    """EfficientNet: inverted residual with squeeze-and-excite."""

    def __init__(self, c):
        super().__init__()
        self.expand, self.depth = conv(c, 4 * c, 1, act=nn.SiLU), conv(4 * c, 4 * c, 3, 1, 4 * c)
        self.squeeze, self.excite = nn.Conv2d(4 * c, c, 1), nn.Conv2d(c, 4 * c, 1)
        self.project, self.bn = nn.Conv2d(4 * c, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        y = self.depth(self.expand(x))
        y = y * self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return x + self.bn(self.project(y))


class ConvNeXt(nn.Module):
    """Channels last inside, a scale per channel."""

    def __init__(self, c):
        super().__init__()
        self.depth, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.scale = nn.Parameter(torch.full((c, 1, 1), 0.5))

    def forward(self, x):
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class ViT(nn.Module):
    """Class token, position embedding, two blocks with a fused qkv."""

    def __init__(self, c=32, heads=4):
        super().__init__()
        self.patch, self.heads = nn.Conv2d(3, c, 8, 8), heads
        self.token = nn.Parameter(torch.randn(1, 1, c))
        self.position = nn.Parameter(torch.randn(1, 17, c))
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(5))
        self.qkv = nn.ModuleList(nn.Linear(c, 3 * c) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(c, c) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(c, 4 * c) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * c, c) for _ in range(2))
        self.head = nn.Linear(c, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for k in range(2):
            y = self.qkv[k](self.norms[2 * k](x)).unflatten(-1, (3, self.heads, 8))
            q, k_, v = y.permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k_, v).transpose(1, 2).flatten(2)
            x = x + self.out[k](y)
            x = x + self.down[k](F.gelu(self.up[k](self.norms[2 * k + 1](x))))
        return self.head(self.norms[4](x)[:, 0])


class Window(nn.Module):
    """Swin: attention in windows of 4 x 4, shifted by half a window, bias by relative position."""

    def __init__(self, c=16, heads=2, shift=0):
        super().__init__()
        self.c, self.heads, self.shift = c, heads, shift
        self.norm, self.qkv, self.out = nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.bias = nn.Parameter(torch.randn(heads, 16, 16))
        self.norm2, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x):  # (N, 8, 8, C)
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(-1, 2, 4, 2, 4, self.c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, self.c)
        y = self.qkv(y).reshape(-1, 16, 3, self.heads, self.c // self.heads)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        logits = (q * (self.c // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias
        if self.shift:
            logits = logits.view(-1, 4, self.heads, 16, 16) + self.mask(x)[None, :, None]
            logits = logits.view(-1, self.heads, 16, 16)
        weights = logits.softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(-1, 16, self.c))
        y = y.view(-1, 2, 2, 4, 4, self.c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, self.c)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def mask(self, x):
        """-100 between pixels that the shift brought together; written part by part."""
        part = x.new_zeros((8, 8))
        for k, rows in enumerate(((0, 4), (4, 6), (6, 8))):
            for j, columns in enumerate(((0, 4), (4, 6), (6, 8))):
                part[rows[0] : rows[1], columns[0] : columns[1]] = 3 * k + j
        part = part.view(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, 16)
        apart = part.unsqueeze(1) - part.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)


class Swin(nn.Module):
    """Two windows, the second shifted."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(Window(), Window(shift=2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.blocks(self.patch(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class Dense(nn.Module):
    """DenseNet: each layer reads all before it."""

    def __init__(self, narrow, growth=8, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(conv(narrow + k * growth, growth) for k in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Shuffle(nn.Module):
    """ShuffleNetV2: half of the channels pass, then both halves are mixed."""

    def __init__(self, c):
        super().__init__()
        h = c // 2
        self.branch = nn.Sequential(conv(h, h, 1), conv(h, h, 3, 1, h, nn.Identity), conv(h, h, 1))

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Inception(nn.Module):
    """GoogLeNet: four branches joined."""

    def __init__(self, c):
        super().__init__()
        self.a, self.b = conv(c, 8, 1), nn.Sequential(conv(c, 8, 1), conv(8, 12))
        self.c, self.d = nn.Sequential(conv(c, 4, 1), conv(4, 8)), conv(c, 4, 1)

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(pooled)], 1)


class UNet(nn.Module):
    """One level down and up again."""

    def __init__(self):
        super().__init__()
        self.first, self.low = conv(3, 12), conv(12, 24)
        self.up, self.merge = nn.ConvTranspose2d(24, 12, 2, 2), conv(24, 12)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.merge(torch.cat([x, self.up(self.low(F.max_pool2d(x, 2)))], 1)))


class LanguageModel(nn.Module):
    """Two LSTM layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 12), nn.Linear(16, WORDS)
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0])


NETS = {
    "resnet50": lambda: resolve("resnet50?num_classes=10").model,
    "mobilenet_v2": lambda: resolve("mobilenet_v2?num_classes=10&width_mult=0.5").model,
    "efficientnet": lambda: Classifier(conv(3, 16, 3, 2), Excited(16), Excited(16), width=16),
    "convnext": lambda: Classifier(nn.Conv2d(3, 16, 4, 4), ConvNeXt(16), ConvNeXt(16), width=16),
    "vit": ViT,
    "swin": Swin,
    "densenet": lambda: Classifier(conv(3, 16, 3, 2), Dense(16), conv(40, 20, 1), width=20),
    "shufflenet": lambda: Classifier(
        conv(3, 16, 3, 2), Shuffle(16), Shuffle(16), conv(16, 32, 1), width=32
    ),
    "googlenet": lambda: Classifier(conv(3, 16, 3, 2), Inception(16), Inception(32), width=32),
    "unet": UNet,
    "lstm": LanguageModel,
}
FLOAT = ("lstm",)  # not quantized


def inputs(name):
    if name == "lstm":
        return torch.randint(WORDS, (8, 6))
    return torch.randn(8, 3, 32, 32)


def fresh(name):
    """The same weights every time; BatchNorm has seen a few batches."""
    torch.manual_seed(0)
    model = NETS[name]()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain mean
    with torch.no_grad():
        for _ in range(4 if norms else 0):
            model(inputs(name))
    return model.eval()


def cut(name, folder):
    """Half of the channels, saved; the outputs are kept for the other process."""
    model, x = fresh(name), inputs(name)
    result = gracile.prune_channels(model, x, ratio=0.5)
    gracile.save_model(folder, result)
    seen = {"input": x, "output": result.model(x).detach().contiguous()}
    save_file(seen, Path(folder) / "seen.safetensors")
    return result


def ship(name, folder):
    """Rebuild, quantize, export; every artifact must compute what the model computes."""
    torch.manual_seed(1)
    seen = load_file(Path(folder) / "seen.safetensors")
    x = seen["input"]
    other = NETS[name]()  # its weights are not those that were saved
    about = Architecture(name=name, sha256=architecture_sha(other))
    loaded = gracile.load_model(folder, x, factory=lambda: ModelSpec(other, about, name, "test"))
    torch.testing.assert_close(loaded.model(x), seen["output"])
    results = {"f32": Result(loaded.model, loaded.plan, tensors=loaded.tensors)}
    for runtime in RUNTIMES:
        gracile.export(results["f32"], runtime, f"{folder}/f32/{runtime}", example=x)
    if name in FLOAT:
        return
    recipe = build(methods={"int8": quantize("ptq")})
    int8 = gracile.compress(
        loaded.model, recipe, example=x, calibration=[inputs(name) for _ in range(4)]
    )
    assert int8.plan.of_kind("bits")
    for runtime in RUNTIMES:
        gracile.export(int8, runtime, f"{folder}/int8/{runtime}", example=x)


if __name__ == "__main__":
    ship(sys.argv[1], sys.argv[2])
