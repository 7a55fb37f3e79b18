"""All models of torchvision: classification, segmentation, video, optical flow, detection."""

from functools import partial
from typing import Any

from torch import nn

from examples.coverage.detection_operators import provide_operators
from examples.coverage.entry import Entry, Floats, Inputs, image
from fxprune.vision import import_torchvision

CLASSIFIERS = """
    alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161
    densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
    efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l
    efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75
    mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf
    regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
    regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf
    regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d
    resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
    shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s
    swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32
    vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
""".split()

SEGMENTATION = """
    deeplabv3_mobilenet_v3_large deeplabv3_resnet101 deeplabv3_resnet50 fcn_resnet101 fcn_resnet50
    lraspp_mobilenet_v3_large
""".split()

DETECTION = """
    fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn
    fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn
    keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2
    retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large
""".split()

# [batch, channels, frames, height, width]: the smallest clips that the networks take.
VIDEO = {
    "mc3_18": (2, 3, 8, 32, 32),
    "mvit_v1_b": (1, 3, 16, 224, 224),
    "mvit_v2_s": (1, 3, 16, 224, 224),
    "r2plus1d_18": (2, 3, 8, 32, 32),
    "r3d_18": (2, 3, 8, 32, 32),
    "s3d": (1, 3, 16, 224, 224),
    "swin3d_b": (2, 3, 4, 64, 64),
    "swin3d_s": (2, 3, 4, 64, 64),
    "swin3d_t": (2, 3, 4, 64, 64),
}

# Side of the images where 64 is too small; a transformer is built for that size.
SIDES = {"inception_v3": 75, "maxvit_t": 224, "vit_h_14": 56}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    **{name: {"image_size": 64} for name in CLASSIFIERS if name.startswith("vit_")},
    "vit_h_14": {"image_size": 56},
    # Detectors scale their images by themselves, to 800 pixels if nobody says otherwise.
    **{name: {"min_size": 64, "max_size": 64} for name in DETECTION if "ssd" not in name},
}
# Their heads run once for every proposal, 1000 of each image if nobody says otherwise.
FEW_PROPOSALS = {"rpn_post_nms_top_n_test": 24, "box_detections_per_img": 8}
OPTIONS |= {name: OPTIONS[name] | FEW_PROPOSALS for name in DETECTION if "rcnn" in name}


def _model(name: str, options: dict[str, Any]) -> nn.Module:
    return import_torchvision().models.get_model(
        name, weights=None, **({"weights_backbone": None} if name in BACKBONED else {}), **options
    )


def _backbone(name: str) -> nn.Module:
    return _model(name, OPTIONS.get(name, {})).backbone


class _Detector(nn.Module):
    """A detector as a function of one batch of images; it takes a list of images by itself."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images):
        return self.detector(list(images))


def _detector(name: str) -> nn.Module:
    provide_operators()
    return _Detector(_model(name, OPTIONS.get(name, {})))


BACKBONED = {*SEGMENTATION, *DETECTION}


def entries() -> list[Entry]:
    """One entry per model; detectors twice: whole, and their backbones."""

    def entry(name: str, inputs: Inputs) -> Entry:
        return Entry("torchvision", name, partial(_model, name, OPTIONS.get(name, {})), inputs)

    raft = (Floats((1, 3, 128, 128)), Floats((1, 3, 128, 128)))
    return [
        *(entry(name, image(SIDES.get(name, 64))) for name in CLASSIFIERS),
        *(entry(name, image(64)) for name in SEGMENTATION),
        *(entry(name, Floats(shape)) for name, shape in VIDEO.items()),
        *(entry(name, raft) for name in ("raft_large", "raft_small")),
        *(
            Entry("torchvision", f"{name}.backbone", partial(_backbone, name), image(_side(name)))
            for name in DETECTION
        ),
        *(
            Entry("torchvision", name, partial(_detector, name), image(_side(name)))
            for name in DETECTION
        ),
    ]


def _side(detector: str) -> int:
    """SSD reduces its image by more than 64."""
    return 300 if detector.startswith("ssd") else 64
