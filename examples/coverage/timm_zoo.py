"""One small model of every family of timm, and some spellings that the smallest does not show."""

from functools import partial
from typing import Any

from torch import nn

from examples.coverage.entry import Entry, image
from fxprune.vision import import_torchvision

# The smallest model of each module of ``timm.models``.
FAMILIES = """
    beit_base_patch16_224 eca_botnext26ts_256 test_byobnet cait_xxs24_224 coat_tiny convit_tiny
    convmixer_768_32 convnext_atto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s
    cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet264d dla46x_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mnasnet_050 efficientvim_m1
    efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0
    hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
    inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0
    test_mambaout coatnet_pico_rw_224 caformer_s18 gmlp_ti16_224 mobilenetv3_small_050
    mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny
    nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny
    regnetx_002 repghostnet_050 repvit_m0_9 res2net50_26w_4s resnest26d test_resnet resnetv2_18
    rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
    swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
    test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224
    volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
""".split()

# Further members of the families above with other layers: squeeze-and-excitation, padding as in
# TensorFlow, weight standardisation, attention in two dimensions.
VARIANTS = """
    resnet18 resnet50d seresnet50 efficientnet_b0 tf_efficientnet_b0 tf_efficientnetv2_b0
    mobilenetv3_large_100 mobilenetv4_conv_small convnext_tiny convnextv2_atto
    vit_tiny_patch16_224 deit3_small_patch16_224 maxvit_rmlp_pico_rw_256 regnety_002 repvgg_a0
    resnetv2_50 ecaresnet26t halonet26t lambda_resnet26t bat_resnext26ts mixer_s32_224
    resmlp_12_224 poolformer_s12 test_convnext test_efficientnet dm_nfnet_f0
""".split()

# Side of the images where 64 is too small.
SIDES = {
    "deepseek_vit_412m": 112,
    "efficientformer_l1": 224,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
    "halonet26t": 256,
    "bat_resnext26ts": 256,
}

# Models that take images of one size only, which they are built for.
SIZED = """
    beit_base_patch16_224 eca_botnext26ts_256 cait_xxs24_224 coat_tiny convit_tiny
    deit_tiny_patch16_224 efficientformerv2_s0 eva02_tiny_patch14_224 gcvit_xxtiny
    hiera_tiny_224 levit_128s coatnet_pico_rw_224 gmlp_ti16_224 nest_tiny pit_ti_224
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
    tnt_s_legacy_patch16_224 visformer_tiny vit_tiny_r_s16_p8_224 test_vit_relpos
    vitamin_small_224 volo_d1_224 vit_tiny_patch16_224 deit3_small_patch16_224
    maxvit_rmlp_pico_rw_256 mixer_s32_224 resmlp_12_224
""".split()

# Two layers of these show all that there is.
OPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "qwen3_vit_88m": {"depth": 2},
}


def _model(name: str, options: dict[str, Any]) -> nn.Module:
    import_torchvision()  # timm imports it
    import timm

    return timm.create_model(name, pretrained=False, **options)


def _entry(name: str) -> Entry:
    side = SIDES.get(name, 64)
    options = OPTIONS.get(name, {}) | ({"img_size": side} if name in SIZED else {})
    return Entry("timm", name, partial(_model, name, options), image(side))


def entries() -> list[Entry]:
    """One entry per family, then the variants."""
    return [_entry(name) for name in (*FAMILIES, *VARIANTS)]
