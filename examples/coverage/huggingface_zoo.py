"""Architectures of Hugging Face transformers, with small random configurations."""

from functools import partial
from typing import Any, NamedTuple

from torch import nn

from examples.coverage.entry import Entry, Floats, Inputs, Tokens, image
from fxprune.vision import import_torchvision


class Architecture(NamedTuple):
    """Class names in ``transformers``, options of the configuration, and inputs.

    Attention is fused where a model can (``attention=None``), or spelled out (``eager``).
    """

    model: str
    config: str
    options: dict[str, Any]
    inputs: Inputs
    attention: str | None = None


VOCABULARY = 97
TOKENS = {"input_ids": Tokens((2, 12), VOCABULARY)}
PIXELS = {"pixel_values": image(64)}
SEQ2SEQ = TOKENS | {"decoder_input_ids": Tokens((2, 7), VOCABULARY)}
SOUND = {"input_values": Floats((2, 4000))}

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0}
PATCHES = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 4,
}
STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
SWIN = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
WAV = {
    "vocab_size": 32,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
TWO_TOWERS = {"text_config": ENCODER | {"eos_token_id": 2}, "vision_config": PATCHES}
RESNET = {"embedding_size": 16, **STAGES, "layer_type": "basic"}
DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "num_queries": 9,
}
DEFORMABLE = {
    **DETR,
    "d_model": 64,
    "num_feature_levels": 4,
    "backbone_config": {
        "model_type": "resnet",
        **RESNET,
        "out_features": ["stage2", "stage3", "stage4"],
    },
}

ARCHITECTURES = {
    # encoders
    "bert": Architecture("BertModel", "BertConfig", ENCODER, TOKENS),
    "bert-eager": Architecture("BertModel", "BertConfig", ENCODER, TOKENS, "eager"),
    "bert-mlm": Architecture("BertForMaskedLM", "BertConfig", ENCODER, TOKENS),
    "bert-classifier": Architecture("BertForSequenceClassification", "BertConfig", ENCODER, TOKENS),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 80,
            "max_position_embeddings": 64,
        },
        TOKENS,
    ),
    "roberta": Architecture("RobertaForSequenceClassification", "RobertaConfig", ENCODER, TOKENS),
    "electra": Architecture(
        "ElectraForSequenceClassification",
        "ElectraConfig",
        ENCODER | {"embedding_size": 24},
        TOKENS,
    ),
    "albert": Architecture("AlbertModel", "AlbertConfig", ENCODER | {"embedding_size": 24}, TOKENS),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        TOKENS,
        "eager",
    ),
    "fnet": Architecture("FNetModel", "FNetConfig", ENCODER, TOKENS),
    "modernbert": Architecture(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        ENCODER
        | {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        TOKENS,
    ),
    # decoders
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
        TOKENS,
    ),
    "gpt2-eager": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
        TOKENS,
        "eager",
    ),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER, TOKENS),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", DECODER, TOKENS),
    "llama-eager": Architecture("LlamaForCausalLM", "LlamaConfig", DECODER, TOKENS, "eager"),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", DECODER, TOKENS),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", DECODER, TOKENS),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", DECODER, TOKENS),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", DECODER, TOKENS),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", DECODER, TOKENS),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 80,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 48,
        },
        TOKENS,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4},
        TOKENS,
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8},
        TOKENS,
    ),
    # encoder and decoder
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, SEQ2SEQ),
    "t5-encoder": Architecture("T5EncoderModel", "T5Config", T5, TOKENS),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", BART, SEQ2SEQ),
    # sound
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        BART
        | {
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        {"input_features": Floats((2, 16, 64)), "decoder_input_ids": Tokens((2, 7), VOCABULARY)},
    ),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", "Wav2Vec2Config", WAV, SOUND),
    "hubert": Architecture("HubertForCTC", "HubertConfig", WAV, SOUND),
    "audio-spectrogram-transformer": Architecture(
        "ASTForAudioClassification",
        "ASTConfig",
        PATCHES | {"max_length": 48, "num_mel_bins": 32},
        {"input_values": Floats((2, 48, 32))},
    ),
    # vision
    "vit": Architecture("ViTForImageClassification", "ViTConfig", PATCHES, PIXELS),
    "vit-eager": Architecture("ViTForImageClassification", "ViTConfig", PATCHES, PIXELS, "eager"),
    "deit": Architecture("DeiTForImageClassification", "DeiTConfig", PATCHES, PIXELS),
    "beit": Architecture(
        "BeitForImageClassification",
        "BeitConfig",
        PATCHES | {"use_relative_position_bias": True},
        PIXELS,
    ),
    "dinov2": Architecture("Dinov2ForImageClassification", "Dinov2Config", PATCHES, PIXELS),
    "yolos": Architecture(
        "YolosForObjectDetection",
        "YolosConfig",
        PATCHES | {"image_size": [64, 64], "num_detection_tokens": 5},
        PIXELS,
    ),
    "swin": Architecture("SwinForImageClassification", "SwinConfig", SWIN, PIXELS),
    "swinv2": Architecture("Swinv2ForImageClassification", "Swinv2Config", SWIN, PIXELS),
    "convnext": Architecture("ConvNextForImageClassification", "ConvNextConfig", STAGES, PIXELS),
    "convnextv2": Architecture(
        "ConvNextV2ForImageClassification", "ConvNextV2Config", STAGES, PIXELS
    ),
    "resnet": Architecture("ResNetForImageClassification", "ResNetConfig", RESNET, PIXELS),
    "regnet": Architecture(
        "RegNetForImageClassification",
        "RegNetConfig",
        STAGES | {"embedding_size": 16, "groups_width": 8, "layer_type": "y"},
        PIXELS,
    ),
    "mobilenet-v2": Architecture(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", {}, PIXELS
    ),
    "mobilevit": Architecture(
        "MobileViTForImageClassification", "MobileViTConfig", {"image_size": 64}, PIXELS
    ),
    "segformer": Architecture("SegformerForSemanticSegmentation", "SegformerConfig", {}, PIXELS),
    "dpt": Architecture(
        "DPTForDepthEstimation",
        "DPTConfig",
        PATCHES
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 24, 32, 40],
            "fusion_hidden_size": 24,
            "reassemble_factors": [4, 2, 1, 0.5],
        },
        PIXELS,
    ),
    "detr": Architecture("DetrForObjectDetection", "DetrConfig", DETR, PIXELS),
    "deformable-detr": Architecture(
        "DeformableDetrForObjectDetection", "DeformableDetrConfig", DEFORMABLE, PIXELS
    ),
    # image and text
    "clip": Architecture(
        "CLIPModel", "CLIPConfig", TWO_TOWERS | {"projection_dim": 24}, TOKENS | PIXELS
    ),
    "clip-vision": Architecture("CLIPVisionModel", "CLIPVisionConfig", PATCHES, PIXELS),
    "siglip": Architecture("SiglipModel", "SiglipConfig", TWO_TOWERS, TOKENS | PIXELS),
}


def _model(architecture: Architecture) -> nn.Module:
    import_torchvision()  # transformers imports it for some models
    import transformers

    options = dict(architecture.options)
    if architecture.config == "DetrConfig":
        options["backbone_config"] = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    if architecture.attention:
        options["attn_implementation"] = architecture.attention
    config = getattr(transformers, architecture.config)(**options)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return getattr(transformers, architecture.model)(config)


def entries() -> list[Entry]:
    """One entry per architecture, in the order of the table."""
    return [
        Entry("transformers", name, partial(_model, found), found.inputs)
        for name, found in ARCHITECTURES.items()
    ]
