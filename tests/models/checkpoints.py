"""Small random checkpoints in the format that each family of backbones is published in."""

import json

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig

from bridge_stg.models.backbones import FAMILIES

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IDS = {token: 256 + i for i, token in enumerate(SPECIALS)}
TOKEN_FIELDS = {
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
}
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
TURNS = """{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% for content in message['content'] %}{% if content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": IDS["<|endoftext|>"],
    "eos_token_id": IDS["<|im_end|>"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.1,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_cache": True,
}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "initializer_range": 0.1,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def published_config(model_type):
    """config.json as on the Hub: Qwen2.5-VL keeps the LLM's fields at the top, Qwen3-VL under text_config."""
    if model_type == "qwen2_5_vl":
        vision = {"fullatt_block_indexes": [2], "hidden_act": "silu", "tokens_per_second": 2, "window_size": 32}
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "max_window_layers": 4,
            "model_type": model_type,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_sliding_window": False,
            "vision_config": VISION | vision,
            "vocab_size": 280,  # more rows than tokens, as published
            **TEXT,
            **TOKEN_FIELDS,
        }
    moe = model_type == "qwen3_vl_moe"
    vision = {
        "deepstack_visual_indexes": [0, 1],
        "hidden_act": "gelu_pytorch_tanh",
        "model_type": model_type,
        "num_position_embeddings": 16,
    }
    text = {
        "attention_bias": False,
        "dtype": "float32",
        "head_dim": 16,
        "model_type": f"{model_type}_text",
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        "vocab_size": 264,  # not one row to spare
    }
    experts = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return {
        "architectures": [FAMILIES[model_type].model_class],
        "model_type": model_type,
        "text_config": TEXT | text | (experts if moe else {}),
        "tie_word_embeddings": not moe,  # as in the 2B and 4B
        "vision_config": VISION | vision,
        **TOKEN_FIELDS,
    }


def write_tokenizer(folder, model_type):
    """A byte-level Qwen2 tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    template = (SYSTEM if model_type == "qwen2_5_vl" else "") + TURNS
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIALS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def write_checkpoint(folder, model_type, seed=0):
    """Sharded safetensors, config.json, tokenizer and processor files of a random backbone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(published_config(model_type)))
    torch.manual_seed(seed)
    network = FAMILIES[model_type].network()(AutoConfig.from_pretrained(folder))
    network.save_pretrained(folder, max_shard_size="200KB")
    (folder / "config.json").write_text(json.dumps(published_config(model_type)))
    write_tokenizer(folder, model_type)
    image = {
        "image_mean": [0.48, 0.46, 0.41] if model_type == "qwen2_5_vl" else [0.5, 0.5, 0.5],
        "image_std": [0.27, 0.26, 0.28] if model_type == "qwen2_5_vl" else [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": 8,
        "temporal_patch_size": 2,
    }
    if model_type == "qwen2_5_vl":
        image |= {"min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor"}
    else:
        image |= {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "processor_class": "Qwen3VLProcessor"}
        video = image | {"video_processor_type": "Qwen3VLVideoProcessor"}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder
