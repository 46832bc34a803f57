"""The architectures of the structure benchmark: which, from where, and on which small input.

Names are written out, so that the cells are known where torchvision, timm and transformers are not
installed; a name that torchvision has and this list has not is an error when it is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.structure_parts import detector, language

Example = tuple[Tensor, ...]
Parts = list[tuple[str, nn.Module, Example]]  # (name, what is traced, its inputs)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CLASSIFIERS = _names("""
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161
densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m
efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf
regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf
regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101
resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0
squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn
vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2
wide_resnet50_2
""")
SEGMENTERS = _names("""
deeplabv3_mobilenet_v3_large deeplabv3_resnet101 deeplabv3_resnet50 fcn_resnet101 fcn_resnet50
lraspp_mobilenet_v3_large
""")
DETECTORS = _names("""
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn
fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn
maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16
ssdlite320_mobilenet_v3_large
""")
TIMM = _names("""
resnetv2_50 seresnet50 ecaresnet50t res2net50_26w_4s resnest14d skresnet18 gcresnet50t
regnety_002 tf_efficientnetv2_b0 mobilenetv4_conv_small ghostnetv2_100 dpn48b dla34 vovnet39a
cspresnet50 hrnet_w18_small inception_v4 nfnet_f0 repvgg_a0
rexnet_100 lcnet_050 convnextv2_atto convmixer_768_32 deit_tiny_patch16_224 cait_xxs24_224
xcit_nano_12_p16_224 twins_svt_small pvt_v2_b0 poolformer_s12 mixer_s16_224 gmlp_s16_224
resmlp_12_224 levit_128s mobilevit_xxs edgenext_xx_small efficientvit_b0 fastvit_t8
eva02_tiny_patch14_224 coatnet_nano_rw_224 davit_tiny
""")
LANGUAGE = ("bert", "gpt2", "llama", "vit", "t5", "whisper")

SMOKE = {"resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121", "vit_b_32", "swin_t"}
SIDE = 64
# Where the network does not run on 64 x 64, or trains only on more (auxiliary heads).
SIDES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56, "ssd300_vgg16": 300}
IMAGE_SIZE = ("vit_",)  # these are built for one image size
BATCH = 2  # BatchNorm after global pooling needs two samples to train


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        family: where it comes from; one table each.
        name: in that family.
        package: what must be installed.
        build: makes the whole network and the parts of it that are traced.
    """

    family: str
    name: str
    package: str
    build: Callable[[], tuple[nn.Module, Parts]]

    @property
    def tier(self) -> str:
        """`smoke` for the few that are measured often."""
        torchvision = self.family == "torchvision classification"
        return "smoke" if torchvision and self.name in SMOKE else "full"


def architectures() -> dict[str, Architecture]:
    """`family/name` -> architecture, in the order of the tables."""
    listed = (
        ("torchvision classification", CLASSIFIERS, "torchvision", _classifier),
        ("torchvision segmentation", SEGMENTERS, "torchvision", _segmenter),
        ("torchvision detection", DETECTORS, "torchvision", _detector),
        ("timm", TIMM, "timm", _timm),
        ("transformers", LANGUAGE, "transformers", language),
    )
    return {
        f"{family}/{name}": Architecture(family, name, package, lambda b=build, n=name: b(n))
        for family, names, package, build in listed
        for name in names
    }


def images(side: int) -> Example:
    """Standard normal images."""
    return (torch.randn(BATCH, 3, side, side),)


def _classifier(name: str) -> tuple[nn.Module, Parts]:
    zoo = _torchvision()
    side = SIDES.get(name, SIDE)
    options = {"image_size": side} if name.startswith(IMAGE_SIZE) else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model = zoo.get_model(name, weights=None, **options)
    return model, [("model", model, images(side))]


def _segmenter(name: str) -> tuple[nn.Module, Parts]:
    model = _torchvision().get_model(name, weights=None, weights_backbone=None)
    return model, [("model", model, images(SIDE))]


def _detector(name: str) -> tuple[nn.Module, Parts]:
    model = _torchvision().get_model(name, weights=None, weights_backbone=None)
    side = 320 if name.startswith("ssd") else 2 * SIDE
    return model, detector(model, images(SIDES.get(name, side)))


def _timm(name: str) -> tuple[nn.Module, Parts]:
    from benchmarks.torchvision_shim import torchvision

    torchvision()
    import timm

    model = timm.create_model(name, pretrained=False)
    config = model.default_cfg
    fixed = config.get("fixed_input_size") or config.get("pool_size") is None
    side = config["input_size"][-1] if fixed else 2 * SIDE
    return model, [("model", model, images(side))]


def _torchvision():
    from benchmarks.torchvision_shim import torchvision

    zoo = torchvision().models
    for module, listed in (
        (zoo, CLASSIFIERS),
        (zoo.segmentation, SEGMENTERS),
        (zoo.detection, DETECTORS),
    ):
        missing = sorted(set(zoo.list_models(module=module)) - set(listed))
        if missing:
            raise RuntimeError(f"structure_zoo.py does not list torchvision's {missing}; add them.")
    return zoo
