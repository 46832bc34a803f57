"""Networks that are traced in parts, with tensors in and out: detectors and language models."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Example = tuple[Tensor, ...]
Parts = list[tuple[str, nn.Module, Example]]


class OfTwo(nn.Module):
    """A head over a list of feature maps, called with two of them (it is the same for all)."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, a: Tensor, b: Tensor) -> object:
        """Whatever the head makes of the list."""
        return self.head([a, b])


class Dense(nn.Module):
    """A detector without regions up to what its heads say about each place."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> object:
        """(N, 3, H, W) -> the head's outputs by name."""
        return self.head(list(self.backbone(images).values()))


def detector(model: nn.Module, images: Example) -> Parts:
    """Backbone, neck and heads, without post-processing.

    One part where the heads read the feature maps; where they read regions of them, a part for the
    backbone with its neck and one for each head, on feature maps of the backbone and on random
    regions. What goes from part to part is then an output and an input, and stays.
    """
    backbone = model.backbone
    if not hasattr(model, "rpn"):
        return [("model", Dense(backbone, model.head), images)]
    with torch.no_grad():
        maps = list(backbone.eval()(*images).values())
    return [
        ("backbone", backbone, images),
        ("rpn.head", OfTwo(model.rpn.head), tuple(maps[:2])),
        *_regions(model.roi_heads, maps[0].shape[1]),
    ]


def _regions(heads: nn.Module, channels: int) -> Parts:
    out: Parts = []
    for kind in ("box", "mask", "keypoint"):
        head = getattr(heads, f"{kind}_head", None)
        if head is not None:
            side = getattr(heads, f"{kind}_roi_pool").output_size[0]
            both = nn.Sequential(head, getattr(heads, f"{kind}_predictor"))
            out.append((f"roi_heads.{kind}", both, (torch.randn(4, channels, side, side),)))
    return out


class ByName(nn.Module):
    """Calls a transformers model with keyword arguments; returns one tensor."""

    def __init__(self, model: nn.Module, names: Sequence[str], output: str):
        super().__init__()
        self.model, self.names, self.output = model, tuple(names), output

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """`a` and `b` under the names given."""
        given = dict(zip(self.names, (a, b), strict=False))
        result: Tensor = self.model(**given, use_cache=False)[self.output]
        return result


class Images(nn.Module):
    """Calls a transformers image model; returns one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        result: Tensor = self.model(pixel_values=pixels).logits
        return result


SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LAYERS = {"num_hidden_layers": 2}
WORDS = 64


def language(name: str) -> tuple[nn.Module, Parts]:
    """A tiny transformers model with random weights: 2 layers, 32 features, 4 heads."""
    from benchmarks.torchvision_shim import torchvision

    torchvision()
    model, inputs = _LANGUAGE[name]()
    return model, [("model", model, inputs)]


def _tokens(steps: int = 7) -> Tensor:
    return torch.randint(2, WORDS, (2, steps))


def _bert() -> tuple[nn.Module, Example]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=WORDS, max_position_embeddings=16, **SIZE, **LAYERS)
    return _Classifier(BertForSequenceClassification(config)), (_tokens(),)


class _Classifier(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=tokens).logits
        return result


def _gpt2() -> tuple[nn.Module, Example]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return ByName(GPT2LMHeadModel(config), ("input_ids",), "logits"), (_tokens(),)


def _llama() -> tuple[nn.Module, Example]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=16, num_key_value_heads=2, **SIZE, **LAYERS
    )
    return ByName(LlamaForCausalLM(config), ("input_ids",), "logits"), (_tokens(),)


def _vit() -> tuple[nn.Module, Example]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=16, patch_size=4, **SIZE, **LAYERS)
    return Images(ViTForImageClassification(config)), (torch.randn(2, 3, 16, 16),)


def _t5() -> tuple[nn.Module, Example]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = ByName(T5ForConditionalGeneration(config), ("input_ids", "decoder_input_ids"), "logits")
    return model, (_tokens(), _tokens(5))


def _whisper() -> tuple[nn.Module, Example]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=WORDS, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=10, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    whisper = WhisperForConditionalGeneration(config)
    model = ByName(whisper, ("input_features", "decoder_input_ids"), "logits")
    return model, (torch.randn(2, 8, 20), _tokens(5))


_LANGUAGE: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "vit": _vit,
    "t5": _t5,
    "whisper": _whisper,
}
