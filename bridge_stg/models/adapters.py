"""`BridgeSTGPreTrainedModel`: built on a pretrained backbone, adapted with LoRA or frozen, saved and loaded."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..files import atomic_path, write_text
from .backbone_loading import build_from_backbone, reread_backbone
from .backbones import family_of, fingerprint
from .configuration_bridge_stg import BridgeSTGConfig
from .model_files import one_line, read_json
from .pickling import state_without_recorders
from .processing_bridge_stg import BridgeSTGProcessor
from .saved_folder import LOADING, is_dtype, read_saved_config, read_saved_processor
from .vision_attention import batch_vision_attention

RECORD_FILE = "bridge_stg_adapter.json"
SPATIAL_FILE = "spatial.safetensors"
LORA_FILE = "adapter_model.safetensors"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RECORD_FIELDS = {"backbone": str, "fingerprint": str, "dtype": str, "processor": dict}
_SOURCE_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only")  # the processor is there too
_BACKBONE = "backbone."
_PEFT_PREFIX = "base_model.model."  # what peft writes before the names of the model it wraps


class BridgeSTGPreTrainedModel(PreTrainedModel):
    """Owns the backbone and the processor: builds on a checkpoint, freezes and adapts it, saves and loads the model.

    Args:
        config: the architecture.
        backbone: a loaded backbone of `config.backbone_config`, taken as it is; None builds one with random weights.
    """

    config_class = BridgeSTGConfig
    base_model_prefix = "bridge_stg"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    # In bfloat16 a box would be off by 0.4% of a frame; the spatial half is small beside a real backbone.
    _keep_in_fp32_modules_strict: list[str] = [  # noqa: RUF012 (transformers makes it the instance's)
        "semantic_bridge",
        "blind_queries",
        "bridge_embeddings",
        "memory_norm",
        "memory_projection",
        "memory_position",
        "memory_phase",
        "memory_lm_norm",
        "memory_lm_projection",
        "pruner",
        "spatial_decoder",
        "frame_contrast",
        "dense_alignment",
    ]

    config: BridgeSTGConfig
    _processor: BridgeSTGProcessor | None = None
    _processor_source: dict[str, Any] | None = None
    _lora_settings: Any = None

    def __init__(self, config: BridgeSTGConfig, backbone: Any = None) -> None:
        super().__init__(config)
        self.family = family_of(config.backbone_config.model_type)
        self.backbone: Any = self.family.network()(config.backbone_config) if backbone is None else backbone
        if backbone is not None:
            for module in backbone.modules():  # or post_init would draw its weights anew
                module.__dict__["_is_hf_initialized"] = True
        batch_vision_attention(self.backbone.model.visual)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the module's own weights as its constructor does; the backbone's classes initialise theirs.

        `transformers` calls this for weights that a checkpoint lacks. It patches the functions of `torch.nn.init` to
        skip weights that were loaded.
        """
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def __getstate__(self) -> dict[str, Any]:
        return state_without_recorders(self.__dict__)

    @property
    def processor(self) -> BridgeSTGProcessor:
        """The processor that was saved beside the weights; set it for a model that was never saved.

        Raises:
            ModelError: there is no processor, or it belongs to another model.
        """
        if self._processor is None:
            options = self._processor_source or {}
            folder = Path(self.name_or_path, options.get("subfolder", ""))
            if not self.name_or_path:
                raise ModelError("The model has no processor: set model.processor, or load a saved model.")
            if folder.is_dir():
                self._processor = read_saved_processor(folder, self.config)
            else:
                self._processor = BridgeSTGProcessor.from_pretrained(self.name_or_path, **options)
        return self._processor

    @processor.setter
    def processor(self, value: BridgeSTGProcessor) -> None:
        self._processor = value

    @classmethod
    def from_backbone(
        cls,
        name_or_folder: str | os.PathLike[str] | PreTrainedConfig,
        *,
        processor: Mapping[str, Any] | None = None,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        **spatial_config: Any,
    ) -> Self:
        """Build a model on a pretrained Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE of any size, with a fresh spatial half.

        The tokenizer gets the bridging tokens, and the embedding gets rows for them, which start near the mean of the
        other rows. The spatial half stays in float32.

        Args:
            name_or_folder: a folder in the family's published format, or a name on the Hugging Face Hub. A
                configuration of the family in place of it reads no file: the model is on the meta device, which holds
                shapes and no numbers, and its tokenizer knows special tokens alone.
            processor: fields of `BridgeSTGProcessor` that differ from what the checkpoint says.
            dtype: dtype of the backbone; "auto" takes that of the checkpoint.
            attn_implementation: attention of the backbone: "flash_attention_2", "sdpa" or "eager".
            spatial_config: fields of `BridgeSTGConfig`.

        Raises:
            ModelError: there is no such checkpoint, it is of another family, or files are missing.
            ConfigError: a field is unknown or out of range.
        """
        return build_from_backbone(
            cls,
            name_or_folder,
            processor=processor or {},
            dtype=dtype,
            attn_implementation=attn_implementation,
            spatial_config=spatial_config,
        )

    # Training a part ------------------------------------------------------------------------------------------

    def freeze_backbone(self) -> None:
        """Train the spatial half and the bridging tokens only."""
        self._forget_a_changed_backbone()
        self.backbone.requires_grad_(False)

    def _forget_a_changed_backbone(self) -> None:
        """Clear the checkpoint's name if the weights have changed since: the backbone must then be saved whole."""
        if self.config.backbone_name is not None and fingerprint(self.backbone) != self.config.backbone_fingerprint:
            self.config.backbone_name = self.config.backbone_fingerprint = None

    def add_lora(
        self,
        rank: int = 16,
        *,
        alpha: float | None = None,
        targets: Sequence[str] = LORA_TARGETS,
        dropout: float = 0.05,
    ) -> None:
        """Freeze the backbone and add trainable low-rank adapters (float32, by `peft`) to linear layers of its LLM.

        In a mixture of experts only the attention is adapted, because the experts are not linear layers.

        Args:
            rank: rank of the updates.
            alpha: scale of the updates; None means 2 x rank.
            targets: names of the linear layers to adapt.
            dropout: dropout on the adapters' input in training.

        Raises:
            ModelError: peft is not installed, there are adapters already, no layer has one of the names, or the
                backbone is not a checkpoint that adapters could refer to.
        """
        peft = _peft()
        if self.has_lora:
            raise ModelError("The model has LoRA adapters already; merge_lora() makes room for new ones.")
        self._forget_a_changed_backbone()
        if self.config.backbone_name is None:
            raise ModelError(
                "LoRA adapts a backbone as from_backbone read it; this one is our own, or was trained since."
            )
        names = "|".join(targets)
        settings = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules=rf".*language_model\.layers\.\d+\..*\.({names})",
            base_model_name_or_path=self.config.backbone_name,
        )
        self._inject(settings)

    def _inject(self, settings: Any) -> None:
        try:
            _peft().inject_adapter_in_model(settings, self.backbone)
        except ValueError as error:
            raise ModelError(f"LoRA cannot be added: {one_line(error)}.") from error
        for name, parameter in self.backbone.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        self.backbone.train(self.backbone.training)  # new modules are in training mode, where they drop inputs
        self._lora_settings = settings

    @property
    def has_lora(self) -> bool:
        return self._lora_settings is not None

    def merge_lora(self) -> None:
        """Add the adapters to the backbone's weights and remove them; `save_pretrained` then saves the whole model."""
        from peft.tuners.lora import LoraLayer

        for name, module in list(self.backbone.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge(safe_merge=True)
                self.backbone.set_submodule(name, module.get_base_layer())
        self._lora_settings = None
        self.config.backbone_name = self.config.backbone_fingerprint = None

    def apply_liger(self) -> None:
        """Switch the LLM's norms, rotary embedding and feed-forward to the kernels of the package liger-kernel.

        Raises:
            ModelError: the package is not installed, or has no kernels for the backbone.
        """
        try:
            liger = importlib.import_module("liger_kernel.transformers")
        except ImportError as error:
            raise ModelError("Liger kernels need the package liger-kernel, which is not installed.") from error
        patch = getattr(liger, self.family.liger_patch, None)
        if patch is None:
            raise ModelError(f"This version of liger-kernel has no kernels for {self.family.label}.")
        patch(cross_entropy=False, fused_linear_cross_entropy=False, model=self.backbone)

    # Saving ---------------------------------------------------------------------------------------------------

    @property
    def backbone_is_original(self) -> bool:
        """Whether the backbone, apart from LoRA, is still its checkpoint; only what was added then needs saving."""
        trainable = (name for name, p in self.backbone.named_parameters() if p.requires_grad)
        return self.config.backbone_name is not None and all("lora_" in name for name in trainable)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the whole model in safetensors, or call `save_adapters` if the backbone is still its checkpoint."""
        if not self.backbone_is_original:
            super().save_pretrained(save_directory, **kwargs)
        elif kwargs.get("push_to_hub"):
            raise ModelError("push_to_hub does not send adapters; save them and upload the folder.")
        elif kwargs.get("is_main_process", True):
            self.save_adapters(save_directory, state_dict=kwargs.get("state_dict"))

    def save_adapters(
        self, folder: str | os.PathLike[str], *, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Save the adapters (in peft's format), the spatial half, and a reference to the backbone in place of it.

        Args:
            folder: where to save; it is created if missing.
            state_dict: weights of the whole model, gathered over ranks; None takes the model's own.

        Raises:
            ModelError: the backbone itself was trained, or came from no checkpoint.
        """
        if not self.backbone_is_original:
            raise ModelError("Adapters can only be saved apart from a frozen backbone that came from a checkpoint.")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        spatial = {k: v.detach().cpu().contiguous() for k, v in weights.items() if not k.startswith(_BACKBONE)}
        with atomic_path(path / SPATIAL_FILE) as temporary:
            save_file(spatial, temporary, metadata={"format": "pt"})
        if self.has_lora:
            lora = {
                _PEFT_PREFIX + k.removeprefix(_BACKBONE).replace(".default.", "."): v.detach().cpu().contiguous()
                for k, v in weights.items()
                if "lora_" in k
            }
            with atomic_path(path / LORA_FILE) as temporary:
                save_file(lora, temporary, metadata={"format": "pt"})
            self._lora_settings.save_pretrained(path)
        self.config.save_pretrained(path)
        record = {
            "backbone": self.config.backbone_name,
            "fingerprint": self.config.backbone_fingerprint,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "processor": self.processor.settings(),
        }
        write_text(path / RECORD_FILE, json.dumps(record, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load_adapters(
        cls,
        folder: str | os.PathLike[str],
        backbone: str | os.PathLike[str] | None = None,
        *,
        config: BridgeSTGConfig | None = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """Load a model from a folder that `save_adapters` wrote, and its backbone.

        Args:
            folder: the folder.
            backbone: folder or name of the backbone; None takes the one in the record.
            config: replaces the saved configuration.
            attn_implementation: see `from_backbone`.

        Raises:
            ModelError: files are missing or broken, or the backbone is not the one that was adapted.
        """
        path = Path(folder)
        record = _read_record(path / RECORD_FILE)
        config = config or read_saved_config(path)
        source = record["backbone"] if backbone is None else backbone
        model = reread_backbone(cls, source, config, record, attn_implementation, adapters=path)
        if (path / LORA_FILE).is_file():
            model._inject(_peft().LoraConfig.from_pretrained(str(path)))
            lora = {
                _BACKBONE + _with_adapter_name(k.removeprefix(_PEFT_PREFIX)): v
                for k, v in _read(path / LORA_FILE).items()
            }
        else:
            model.freeze_backbone()
            lora = {}
        found = lora | _read(path / SPATIAL_FILE)
        wanted = {k for k in model.state_dict() if "lora_" in k or not k.startswith(_BACKBONE)}
        if missing := sorted(wanted - found.keys()):
            raise ModelError(f"{path} is incomplete: its weights lack {len(missing)} tensors, such as {missing[0]}.")
        model.load_state_dict({k: found[k] for k in wanted}, strict=False)
        model.name_or_path = str(path)
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as `PreTrainedModel.from_pretrained` does; a folder of adapters loads its backbone too.

        Raises:
            ModelError: a folder of adapters does not take one of the options, or `load_adapters` fails.
        """
        folder = Path(str(pretrained_model_name_or_path)) / kwargs.get("subfolder", "")
        if not is_adapter_folder(folder):
            with LOADING:
                loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model._processor_source = {name: kwargs[name] for name in _SOURCE_OPTIONS if name in kwargs}
            return loaded
        taken = ("config", "attn_implementation", "subfolder", "local_files_only", "use_safetensors")
        # AutoModel passes options that ask for nothing, and adapter_kwargs, which are for peft on a stock model.
        asked = {name for name, value in kwargs.items() if value is not None and value is not False}
        if refused := [*map(str, args), *sorted(asked - {*taken, "adapter_kwargs"})]:
            raise ModelError(
                f"{folder} holds adapters, which load without the option {refused[0]}; there are {', '.join(taken)}."
            )
        return cls.load_adapters(
            folder, config=kwargs.get("config"), attn_implementation=kwargs.get("attn_implementation")
        )


def is_adapter_folder(folder: Any) -> bool:
    return (Path(str(folder)) / RECORD_FILE).is_file()


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    for name, kind in _RECORD_FIELDS.items():
        if not isinstance(value := record.get(name), kind):
            raise ModelError(f"{path} is wrong: {name} must be a {kind.__name__}, got {value!r}.")
    if not is_dtype(record["dtype"]):
        raise ModelError(f"{path} is wrong: dtype must be one of torch's, got {record['dtype']!r}.")
    return record


def _with_adapter_name(key: str) -> str:
    head, _, tail = key.rpartition(".")
    return f"{head}.default.{tail}"


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # a missing file, or one of safetensors' own errors
        raise ModelError(f"{path} cannot be read: {one_line(error)}.") from error


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError("LoRA needs the package peft, which is not installed.") from error
    return peft
