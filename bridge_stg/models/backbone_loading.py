"""Reading a pretrained video MLLM: its folder, processor files, tokenizer and weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ..errors import ConfigError, ModelError
from ..settings import check_fields
from .backbones import BackboneFamily, family_of, fingerprint
from .configuration_bridge_stg import MODEL_RULES, BridgeSTGConfig
from .model_files import one_line, read_json
from .processing_bridge_stg import BridgeSTGProcessor
from .processor_settings import check_processor_settings
from .saved_folder import LOADING
from .tiny import tiny_tokenizer

_IMAGE_FILES = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_WANTED_FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
_SENTENCE = "<<sentence and video>>"


def build_from_backbone(
    model_class: Any,
    source: str | os.PathLike[str] | PreTrainedConfig,
    *,
    processor: Mapping[str, Any],
    dtype: torch.dtype | str,
    attn_implementation: str | None,
    spatial_config: Mapping[str, Any],
) -> Any:
    """See `BridgeSTGForVideoGrounding.from_backbone`."""
    spatial_config = check_fields(spatial_config, MODEL_RULES, "from_backbone")
    processor = check_processor_settings(processor, "from_backbone", prefix="processor.")
    count = spatial_config.get("bridge_tokens", BridgeSTGConfig.bridge_tokens)
    if isinstance(source, PreTrainedConfig):
        name = source.name_or_path or source.model_type
        settings = _sizes(source.vision_config) | {"bridge_tokens": count}
        built = BridgeSTGProcessor(tiny_tokenizer((), bridge_tokens=count), **(settings | processor))
        backbone = network_on_meta(source, dtype, attn_implementation)
    else:
        folder = find_folder(source)
        name = str(folder.resolve() if Path(source).is_dir() else source)
        backbone_config, family = read_config(folder)
        built = read_processor(folder, family, backbone_config, count, processor)
        backbone = read_weights(folder, family, backbone_config, dtype, attn_implementation)
    mark = fingerprint(backbone)
    first_id = built.tokenizer.convert_tokens_to_ids("<|bridge_0|>")
    add_embedding_rows(backbone, first_id, count)
    layers = backbone.config.text_config.num_hidden_layers
    fields: dict[str, Any] = {
        "bridge_layers": min(6, layers),
        "bridge_token_id": first_id,
        "separate_bridge_embeddings": True,
        "backbone_name": name,
        "backbone_fingerprint": mark,
    }
    attention, experts = backbone.config._attn_implementation, getattr(backbone.config, "_experts_implementation", None)
    try:
        config = BridgeSTGConfig(backbone_config=backbone.config, **(fields | spatial_config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    backbone.config._experts_implementation = experts  # which a new configuration forgets, also in those that it holds
    return assemble(model_class, config, backbone, built, attention)


def reread_backbone(
    model_class: Any,
    name_or_folder: str | os.PathLike[str],
    config: BridgeSTGConfig,
    record: Mapping[str, Any],
    attn_implementation: str | None,
    *,
    adapters: Path,
) -> Any:
    """Load the backbone that the adapters were trained on, and build `config`'s spatial half on it, untrained.

    Args:
        record: what `save_adapters` recorded of the backbone.
        adapters: their folder, for messages.

    Raises:
        ModelError: the folder holds another backbone.
    """
    refusal = (
        f"{adapters} adapts {record['backbone']} (fingerprint {record['fingerprint']}), "
        f"and {name_or_folder} is another backbone."
    )
    folder = find_folder(name_or_folder)
    found, family = read_config(folder)
    if found.model_type != config.backbone_config.model_type:
        raise ModelError(refusal)
    backbone = read_weights(folder, family, found, record["dtype"], attn_implementation)
    if fingerprint(backbone) != record["fingerprint"]:
        raise ModelError(refusal)
    settings = check_processor_settings(record["processor"], str(adapters), prefix="processor.", error=ModelError)
    processor = read_processor(folder, family, found, config.bridge_tokens, settings)
    add_embedding_rows(backbone, int(config.bridge_token_id or 0), config.bridge_tokens)
    config.backbone_config = backbone.config
    return assemble(model_class, config, backbone, processor, backbone.config._attn_implementation)


def assemble(
    model_class: Any, config: BridgeSTGConfig, backbone: Any, processor: BridgeSTGProcessor, attention: str
) -> Any:
    """The model around a loaded backbone.

    Args:
        attention: name of the attention implementation, which a new configuration does not take over.
    """
    config._attn_implementation = attention
    with torch.device("meta") if backbone.device.type == "meta" else nullcontext():
        model = model_class(config, backbone=backbone)
    first = int(config.bridge_token_id or 0)
    rows = backbone.get_input_embeddings().weight[first : first + config.bridge_tokens]
    with torch.no_grad():
        model.bridge_embeddings.copy_(rows)
    model.processor = processor
    return model.eval()


def find_folder(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder itself, or a snapshot of the Hub's repository of that name.

    Raises:
        ModelError: there is neither.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name_or_folder), allow_patterns=_WANTED_FILES))
        except Exception as error:  # a dozen kinds, from a malformed name to no network
            raise ModelError(
                f"{name_or_folder} is neither a folder nor a checkpoint that the Hub gives: {one_line(error)}."
            ) from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json.")
    return folder


def read_config(folder: Path) -> tuple[PreTrainedConfig, BackboneFamily]:
    """The configuration of a backbone and its family.

    Raises:
        ModelError: the file cannot be read, or is of another family.
    """
    family = family_of(read_json(folder / "config.json").get("model_type"), folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True), family
    except Exception as error:
        raise ModelError(f"{folder}/config.json is no {family.label} configuration: {one_line(error)}.") from error


def read_weights(
    folder: Path,
    family: BackboneFamily,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    attn_implementation: str | None,
) -> Any:
    """Load the network with the weights in a folder, which may be sharded.

    Raises:
        ModelError: there are no safetensors, or they are incomplete.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with LOADING:
            backbone, loading = family.network().from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # transformers and safetensors raise a dozen kinds here
        raise ModelError(f"The weights in {folder} cannot be loaded: {one_line(error)}.") from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{folder} is incomplete: its weights lack {len(missing)} tensors, such as {missing[0]}.")
    return backbone


def network_on_meta(config: Any, dtype: torch.dtype | str, attn_implementation: str | None) -> Any:
    """Build the network on the meta device, in the dtype that `read_weights` would give it.

    sdpa stands in for flash attention, whose package may be missing: it has the same shapes and saves as much for the
    backward pass.
    """
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    config._attn_implementation = "eager" if attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        network = family_of(config.model_type).network()(config)
    return network.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))


def read_processor(
    folder: Path, family: BackboneFamily, config: Any, bridge_tokens: int, overrides: Mapping[str, Any]
) -> BridgeSTGProcessor:
    """Build our processor with a checkpoint's tokenizer, chat template, pixel statistics and patch sizes.

    The area of a frame is between 128 and 768 merged tokens, the bounds of Qwen's own video reader.

    Raises:
        ModelError: a file is missing, or its tokens do not fit the configuration.
    """
    image = _image_settings(folder)
    tokenizer = _tokenizer(folder, config, bridge_tokens)
    prefix, suffix = _chat_frame(folder, tokenizer)
    settings: dict[str, Any] = _sizes(config.vision_config) | {
        "image_mean": image["image_mean"],
        "image_std": image["image_std"],
        "bridge_tokens": bridge_tokens,
        "timestamp_format": family.timestamp_format,
        "prompt_prefix": prefix,
        "prompt_suffix": suffix,
    }
    return BridgeSTGProcessor(tokenizer, **(settings | dict(overrides)))


def _sizes(vision: Any) -> dict[str, Any]:
    """Patch sizes of a vision tower, and the area of a frame: between 128 and 768 merged tokens."""
    token_area = (vision.patch_size * vision.spatial_merge_size) ** 2
    return {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "min_pixels": 128 * token_area,
        "max_pixels": 768 * token_area,
    }


def _image_settings(folder: Path) -> dict[str, Any]:
    for name in _IMAGE_FILES:
        if (folder / name).is_file():
            values = read_json(folder / name)
            for part in (values, values.get("video_processor", {}), values.get("image_processor", {})):
                if isinstance(part, dict) and "image_mean" in part and "image_std" in part:
                    statistics = {key: part[key] for key in ("image_mean", "image_std")}
                    return check_processor_settings(statistics, str(folder / name), error=ModelError)
    raise ModelError(f"{folder} lacks its processor files: no preprocessor_config.json with image_mean and image_std.")


def _tokenizer(folder: Path, config: Any, bridge_tokens: int) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} lacks its processor files: no {' or '.join(_TOKENIZER_FILES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {one_line(error)}.") from error
    expected = {
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    for token, index in expected.items():
        if (found := tokenizer.convert_tokens_to_ids(token)) != index:
            raise ModelError(f"The tokenizer in {folder} gives {token} the id {found}, config.json says {index}.")
    tokens = [f"<|bridge_{i}|>" for i in range(bridge_tokens)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if ids != list(range(ids[0], ids[0] + bridge_tokens)):
        raise ModelError(
            f"The tokenizer in {folder} has bridging tokens with ids that do not follow each other: {ids}."
        )
    return tokenizer


def _chat_frame(folder: Path, tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before and after the content of a single user turn."""
    template = tokenizer.chat_template
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if template is None:
        raise ModelError(f"{folder} lacks its processor files: no chat template.")
    turn = [{"role": "user", "content": [{"type": "text", "text": _SENTENCE}]}]
    try:
        text = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja's errors, or a template that wants something else
        raise ModelError(f"The chat template in {folder} cannot be used: {one_line(error)}.") from error
    before, found, after = text.partition(_SENTENCE)
    if not found:
        raise ModelError(f"The chat template in {folder} leaves out the user's text.")
    return before, after


def add_embedding_rows(backbone: Any, first: int, count: int) -> None:
    """Set `count` rows from `first` on, in embedding and head, to the mean of the rows before them.

    A small seeded noise keeps the bridging tokens apart. Published checkpoints have spare rows; others are enlarged.
    """
    embedding = backbone.get_input_embeddings()
    if embedding.num_embeddings < first + count:
        backbone.resize_token_embeddings(first + count, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    with torch.no_grad():
        for layer in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
            if (weight := layer.weight).data_ptr() in seen:  # tied
                continue
            seen.add(weight.data_ptr())
            known = weight[:first].float()
            noise = torch.randn(count, weight.shape[1], generator=generator).to(weight.device)
            weight[first : first + count] = (known.mean(0) + 0.01 * known.std(0) * noise).to(weight.dtype)
