"""The model definitions of :mod:`benchmarks.models`: torchvision's, timm's and those of the time-series field.

Each family's smallest member, on a small input, with random weights: nothing is downloaded. torchvision and timm are imported
where they are installed; without them only the time-series models are there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from . import time_series_models


@dataclass(frozen=True)
class Definition:
    """``build()`` gives the model; ``shape`` is its input's without the batch."""

    name: str
    source: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]


SMALL, IMAGE, WIDE = (3, 64, 64), (3, 96, 96), (3, 224, 224)
_TORCHVISION = {
    SMALL: [
        "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "mobilenet_v2",
        "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
        "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11_bn", "wide_resnet50_2",
    ],
    IMAGE: ["alexnet", "googlenet", "inception_v3", "vgg11"],
    WIDE: ["maxvit_t", "vit_b_16"],
}  # fmt: skip
_TORCHVISION_OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
_VIDEO = ["mc3_18", "r2plus1d_18", "r3d_18"]
_SEGMENTATION = ["lraspp_mobilenet_v3_large"]
_TIMM = {
    SMALL: [
        "gcresnext26ts", "botnet26t_256", "convnext_atto", "convnextv2_atto", "cspdarknet53",
        "cspresnet50", "densenet121", "dla46_c", "dpn48b", "eca_resnext26ts", "efficientnet_es", "efficientnet_lite0",
        "ese_vovnet19b_slim", "fasternet_t0", "fastvit_t8", "fbnetc_100", "fbnetv3_b", "gernet_s", "ghostnet_050",
        "ghostnetv2_100", "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small", "inception_next_atto", "lcnet_035",
        "legacy_seresnet18", "legacy_xception", "mambaout_femto", "mixnet_s", "mnasnet_small", "mobilenetv2_050",
        "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mobileone_s0", "nf_regnet_b0", "poolformer_s12",
        "regnetx_002", "regnety_002", "regnetz_005", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s",
        "resnest14d", "resnet10t", "resnet18", "resnetblur50", "resnetv2_50", "resnext26ts", "rexnet_100", "selecsls42",
        "semnasnet_050", "seresnext26ts", "skresnet18", "spnasnet_100", "starnet_s1", "tf_efficientnet_lite0",
        "tinynet_e", "visformer_tiny", "xcit_nano_12_p16_224", "xception41p",
    ],
    IMAGE: ["edgenext_xx_small", "efficientvit_b0", "inception_resnet_v2", "inception_v3", "inception_v4", "levit_128s"],
}  # fmt: skip


def definitions() -> dict[str, Definition]:
    """All that can be built here, by name."""
    found = [
        Definition(f"time series: {name}", "papers", (time_series_models.CHANNELS, time_series_models.LENGTH),
                   lambda name=name: time_series_models.build(name))  # type: ignore[misc]
        for name in time_series_models.MODELS
    ]  # fmt: skip
    if importlib.util.find_spec("torchvision") is not None:
        found += _torchvision()
    if importlib.util.find_spec("timm") is not None:
        found += _timm()
    return {definition.name: definition for definition in found}


def _torchvision() -> list[Definition]:
    import torchvision

    source = f"torchvision {torchvision.__version__}"
    shapes: dict[str, tuple[int, ...]] = {name: shape for shape, names in _TORCHVISION.items() for name in names}
    shapes.update(dict.fromkeys(_VIDEO, (3, 4, 32, 32)))
    shapes.update(dict.fromkeys(_SEGMENTATION, IMAGE))

    def build(name: str) -> nn.Module:
        options = dict(_TORCHVISION_OPTIONS.get(name, {}))
        if name in _SEGMENTATION:
            options["weights_backbone"] = None  # type: ignore[assignment]
        return torchvision.models.get_model(name, weights=None, **options)

    return [Definition(f"torchvision: {n}", source, s, lambda n=n: build(n)) for n, s in shapes.items()]  # type: ignore[misc]


def _timm() -> list[Definition]:
    import timm

    def build(name: str, shape: tuple[int, ...]) -> nn.Module:
        try:
            return timm.create_model(name, pretrained=False, num_classes=10, img_size=shape[-1])
        except TypeError:  # most convolutional ones take any size and no such argument
            return timm.create_model(name, pretrained=False, num_classes=10)

    shapes = {name: shape for shape, names in _TIMM.items() for name in names}
    source = f"timm {timm.__version__}"
    return [Definition(f"timm: {n}", source, s, lambda n=n, s=s: build(n, s)) for n, s in shapes.items()]  # type: ignore[misc]
