"""Segmentation, detection, medical imaging and diffusion: four more libraries."""

from functools import partial
from typing import Any

from torch import nn

from examples.coverage.entry import Entry, Floats, Inputs, Tokens, image
from fxprune.vision import import_torchvision

# segmentation-models-pytorch: every decoder on ResNet-18, and other encoders.
DECODERS = """
    Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer
""".split()
ENCODERS = """
    resnet50 resnext50_32x4d se_resnet50 densenet121 efficientnet-b0 mobilenet_v2 vgg11_bn
    inceptionv4 dpn68 xception mit_b0 timm-efficientnet-b0 tu-convnext_atto
""".split()

# ultralytics: the smallest scale of each description that the package ships.
YOLO = """
    yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov8n-p2 yolov8n-ghost
    yolov8n-rtdetr yolo11n yolo11n-seg yolo11n-pose yolo11n-obb yolo11n-cls yolo12n yolo12n-cls
""".split()

VOLUME = Floats((2, 1, 32, 32, 32))
FLAT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
SOLID = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
STEPS = {"channels": (8, 16, 32), "strides": (2, 2)}
MONAI: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "BasicUNet": ("BasicUNet", FLAT | {"features": (8, 8, 16, 32, 64, 8)}, image(64, 1)),
    "BasicUNet-3d": ("BasicUNet", SOLID | {"features": (8, 8, 16, 32, 64, 8)}, VOLUME),
    "UNet": ("UNet", FLAT | STEPS | {"num_res_units": 2}, image(64, 1)),
    "UNet-3d": ("UNet", SOLID | STEPS, VOLUME),
    "AttentionUnet": ("AttentionUnet", FLAT | STEPS, image(64, 1)),
    "SegResNet": ("SegResNet", SOLID | {"init_filters": 8}, VOLUME),
    "DynUNet": (
        "DynUNet",
        SOLID
        | {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
        | {"filters": [8, 16, 24], "res_block": True},
        VOLUME,
    ),
    "VNet": ("VNet", SOLID, Floats((2, 1, 16, 16, 16))),
    "DenseNet121": ("DenseNet121", SOLID, VOLUME),
    "HighResNet": ("HighResNet", SOLID, VOLUME),
    "UNETR": (
        "UNETR",
        {"in_channels": 1, "out_channels": 2, "img_size": (32, 32, 32), "feature_size": 8}
        | {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4},
        VOLUME,
    ),
    "SwinUNETR": ("SwinUNETR", SOLID | {"feature_size": 12}, Floats((1, 1, 64, 64, 64))),
    "ViT": (
        "ViT",
        {"in_channels": 1, "img_size": (32, 32), "patch_size": (8, 8), "spatial_dims": 2}
        | {"hidden_size": 48, "mlp_dim": 96, "num_layers": 2, "num_heads": 4}
        | {"classification": True},
        image(32, 1),
    ),
}

# diffusers: networks of image diffusion at a small width.
BLOCKS = {"layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": (8, 16)}
DIFFUSERS: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "UNet2DModel": (
        "UNet2DModel",
        BLOCKS
        | {"sample_size": 32, "attention_head_dim": 4}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        {"sample": image(32), "timestep": Tokens((2,), 100)},
    ),
    "UNet2DConditionModel": (
        "UNet2DConditionModel",
        BLOCKS
        | {"sample_size": 32, "cross_attention_dim": 24, "attention_head_dim": 4}
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        {
            "sample": image(32, 4),
            "timestep": Tokens((2,), 100),
            "encoder_hidden_states": Floats((2, 7, 24)),
        },
    ),
    "AutoencoderKL": (
        "AutoencoderKL",
        BLOCKS
        | {"down_block_types": ("DownEncoderBlock2D",) * 2}
        | {"up_block_types": ("UpDecoderBlock2D",) * 2},
        {"sample": image(32)},
    ),
    "DiTTransformer2DModel": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "num_layers": 2}
        | {"sample_size": 16, "norm_num_groups": 4},
        {
            "hidden_states": image(16, 4),
            "timestep": Tokens((2,), 100),
            "class_labels": Tokens((2,), 1000),
        },
    ),
}


def _segmentation(decoder: str, encoder: str) -> nn.Module:
    import_torchvision()
    import segmentation_models_pytorch as smp

    return getattr(smp, decoder)(encoder, encoder_weights=None)


def _yolo(name: str) -> nn.Module:
    import_torchvision()
    import ultralytics

    kind = ultralytics.RTDETR if name.endswith("rtdetr") else ultralytics.YOLO
    return kind(f"{name}.yaml").model


def _monai(name: str, options: dict[str, Any]) -> nn.Module:
    import monai.networks.nets

    return getattr(monai.networks.nets, name)(**options)


def _diffusers(name: str, options: dict[str, Any]) -> nn.Module:
    import_torchvision()
    import diffusers

    return getattr(diffusers, name)(**options)


def _side(decoder: str) -> int:
    """The pyramid of PAN halves the smallest map of the encoder three times more."""
    return 256 if decoder == "PAN" else 64


def entries() -> list[Entry]:
    """All entries of the four libraries."""
    pairs = [*((d, "resnet18") for d in DECODERS), *(("Unet", e) for e in ENCODERS)]
    return [
        *(
            Entry("smp", f"{d}-{e}", partial(_segmentation, d, e), image(_side(d)))
            for d, e in pairs
        ),
        *(Entry("ultralytics", name, partial(_yolo, name), image(64)) for name in YOLO),
        *(
            Entry("monai", name, partial(_monai, kind, options), inputs)
            for name, (kind, options, inputs) in MONAI.items()
        ),
        *(
            Entry("diffusers", name, partial(_diffusers, kind, options), inputs)
            for name, (kind, options, inputs) in DIFFUSERS.items()
        ),
    ]
