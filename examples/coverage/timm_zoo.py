"""One small model of every family of timm, and some spellings that the smallest does not show."""

from functools import partial

from torch import nn

from examples.coverage.entry import Entry, image
from fxprune.vision import import_torchvision

# The smallest model of each module of ``timm.models``, and the side of its images.
FAMILIES = {
    "beit_base_patch16_224": 224,
    "eca_botnext26ts_256": 256,
    "test_byobnet": 96,
    "cait_xxs24_224": 224,
    "coat_tiny": 224,
    "convit_tiny": 224,
    "convmixer_768_32": 96,
    "convnext_atto_rms": 96,
    "cpubone_nano": 96,
    "crossvit_tiny_240": 240,
    "csatv2": 96,
    "cs3darknet_focus_s": 96,
    "cspnext_tiny": 96,
    "davit_tiny": 96,
    "deepseek_vit_412m": 126,
    "deit_tiny_patch16_224": 224,
    "densenet264d": 96,
    "dla46x_c": 96,
    "dpn48b": 96,
    "edgenext_xx_small": 96,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "mnasnet_050": 96,
    "efficientvim_m1": 96,
    "efficientvit_b0": 96,
    "efficientvit_m0": 224,
    "eva02_tiny_patch14_224": 224,
    "fasternet_t0": 96,
    "fastvit_t8": 96,
    "focalnet_tiny_srf": 96,
    "gcvit_xxtiny": 224,
    "gemma4_vit_167m": 96,
    "ghostnet_050": 96,
    "hardcorenas_b": 96,
    "hgnetv2_b0": 96,
    "hiera_tiny_224": 224,
    "sam2_hiera_tiny": 224,
    "hrnet_w18_small": 96,
    "iformer_t": 96,
    "inception_next_atto": 96,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
    "lcnetv2_small": 96,
    "levit_128s": 224,
    "lowformer_b0": 96,
    "test_mambaout": 96,
    "coatnet_pico_rw_224": 224,
    "caformer_s18": 96,
    "gmlp_ti16_224": 224,
    "mobilenetv3_small_050": 96,
    "mobilenetv5_base": 96,
    "mobilevit_xxs": 96,
    "mvitv2_tiny": 224,
    "naflexvit_base_patch16_gap": 96,
    "nasnetalarge": 96,
    "nest_tiny": 224,
    "nextvit_small": 96,
    "test_nfnet": 96,
    "pit_ti_224": 224,
    "pnasnet5large": 96,
    "pvt_v2_b0": 96,
    "qwen3_vit_88m": 96,
    "rdnet_tiny": 96,
    "regnetx_002": 96,
    "repghostnet_050": 96,
    "repvit_m0_9": 96,
    "res2net50_26w_4s": 96,
    "resnest26d": 96,
    "test_resnet": 96,
    "resnetv2_18": 96,
    "rexnet_100": 96,
    "selecsls42": 96,
    "legacy_seresnet18": 96,
    "sequencer2d_s": 224,
    "shvit_s1": 96,
    "skresnet18": 96,
    "starnet_s050": 96,
    "swiftformer_xs": 224,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "swinv2_cr_tiny_224": 224,
    "tiny_vit_5m_224": 96,
    "tnt_s_legacy_patch16_224": 224,
    "tresnet_m": 96,
    "twins_svt_small": 224,
    "vgg11": 96,
    "visformer_tiny": 224,
    "test_vit": 160,
    "vit_tiny_r_s16_p8_224": 224,
    "test_vit_relpos": 160,
    "samvit_base_patch16_224": 224,
    "vitamin_small_224": 224,
    "volo_d1_224": 224,
    "ese_vovnet19b_slim_dw": 96,
    "legacy_xception": 96,
    "xception41p": 96,
    "xcit_nano_12_p8_224": 224,
}

# Further members of the families above with other layers: squeeze-and-excitation, padding as in
# TensorFlow, weight standardisation, attention in two dimensions.
VARIANTS = {
    "resnet18": 64,
    "resnet50d": 64,
    "seresnet50": 64,
    "efficientnet_b0": 64,
    "tf_efficientnet_b0": 64,
    "tf_efficientnetv2_b0": 64,
    "mobilenetv3_large_100": 64,
    "mobilenetv4_conv_small": 64,
    "convnext_tiny": 64,
    "convnextv2_atto": 64,
    "vit_tiny_patch16_224": 224,
    "deit3_small_patch16_224": 224,
    "maxvit_rmlp_pico_rw_256": 256,
    "regnety_002": 64,
    "repvgg_a0": 64,
    "resnetv2_50": 64,
    "ecaresnet26t": 64,
    "halonet26t": 256,
    "lambda_resnet26t": 256,
    "bat_resnext26ts": 256,
    "mixer_s32_224": 224,
    "resmlp_12_224": 224,
    "poolformer_s12": 64,
    "test_convnext": 64,
    "test_efficientnet": 64,
    "dm_nfnet_f0": 64,
}


def _model(name: str) -> nn.Module:
    import_torchvision()  # timm imports it
    import timm

    return timm.create_model(name, pretrained=False)


def entries() -> list[Entry]:
    """One entry per family, then the variants."""
    sides = FAMILIES | VARIANTS
    return [Entry("timm", n, partial(_model, n), image(side)) for n, side in sides.items()]
