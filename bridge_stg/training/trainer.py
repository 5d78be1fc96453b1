"""`BridgeSTGTrainer`: the Hugging Face Trainer with our losses, batches in order and checkpoints that are whole."""

from __future__ import annotations

from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ..errors import SampleError
from ..models.losses import LabelCounts, LossWeights, count_labels, loss_sums, mean_losses
from ..models.visual_tokens import frame_mask
from .checkpoints import STAGING, clear_staging, publish, saving
from .data.collate import TrainingBatch
from .sharding import layers_to_shard, load_sharded_optimizer, mixed_precision, shard_on_cpu_too, shard_spatial_half


class BridgeSTGTrainer(Trainer):
    """`transformers.Trainer` with weighted losses, each logged by name, and tube matching after a warmup.

    The training set is read in order (a curriculum or a stream decides what comes when), so that a resumed run sees
    exactly the items that an uninterrupted one would have seen. Losses are means over the batches of a step on all
    ranks: a step is the same however it is cut into batches and shared. A checkpoint appears under its name once it is
    whole.

    Args:
        loss_weights: weight of every term at a step; 0 switches a term off.
        match_after: step from which only the tube hypothesis of least cost is supervised; before it all are.
        batches: places of the training set, batch by batch; batch k goes to rank k modulo the world size. None cuts
            the training set into batches of `per_device_train_batch_size`.
        backbone_learning_rate: of the backbone's parameters; None takes `learning_rate`.
        args, kwargs: of `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        loss_weights: Callable[[int], LossWeights] = lambda step: LossWeights(),
        match_after: int | None = None,
        batches: Any = None,
        backbone_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.batches = batches
        super().__init__(*args, **kwargs)
        self.loss_weights = loss_weights
        self.match_after = match_after
        self.backbone_learning_rate = backbone_learning_rate
        self._labels = LabelCounts(*[0.0] * len(LabelCounts._fields))
        self._batches = 1
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._staging = False

    # Data ------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        assert isinstance(dataset, Sized)
        return SequentialSampler(dataset)

    def get_train_dataloader(self) -> DataLoader:
        if self.batches is None:
            return super().get_train_dataloader()
        assert self.train_dataset is not None
        loader: DataLoader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    # Ranks -----------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.fsdp:
            shard_on_cpu_too()
            if self.args.bf16:
                self.args.fsdp_plugin_args["mixed_precision_policy"] = mixed_precision(torch.bfloat16)
        super().create_accelerator_and_postprocess()

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Make AdamW, with one rate for the backbone and one for the rest; biases and norms do not decay."""
        existing: Any = getattr(self, "optimizer", None)
        if existing is not None:
            return existing
        model: Any = self.model
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layers_to_shard(model)
            shard_spatial_half(model, self._mesh())
        decayed = set(self.get_decay_parameter_names(model))
        rates = {False: self.args.learning_rate, True: self.backbone_learning_rate or self.args.learning_rate}
        parameters = dict(model.named_parameters())
        groups: dict[tuple[bool, bool], list[str]] = {}
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                groups.setdefault((name.startswith("backbone."), name in decayed), []).append(name)
        self._grouped_names = list(groups.values())
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        built: Any = optimizer_class(
            [
                {
                    "params": [parameters[name] for name in names],
                    "lr": rates[backbone],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (backbone, decays), names in groups.items()
            ],
            **options,
        )
        self.optimizer = built
        return built

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            # accelerate has just put sharded parameters into the optimizer by address. Empty shards share one address,
            # so that they are put in again by name.
            parameters = dict(cast(torch.nn.Module, self.model).named_parameters())
            assert self.optimizer is not None
            for group, names in zip(self.optimizer.param_groups, self._grouped_names, strict=True):
                group["params"] = [parameters[name] for name in names]
        return super().create_scheduler(*args, **kwargs)

    def _mesh(self) -> Any:
        """The device mesh that accelerate shards over."""
        mesh, settings = self.accelerator.torch_device_mesh, self.accelerator.parallelism_config
        return None if mesh is None else mesh[tuple(settings.fsdp_dim_names)]

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.args.world_size > 1:
            dist.all_reduce(values)
        return values

    # Losses ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any) -> tuple[list[TrainingBatch], Any]:
        """Take the batches of this rank for one step, and count the labels of the step over all ranks."""
        samples, items = super().get_batch_samples(*args)
        network: Any = self.accelerator.unwrap_model(self.model)
        vision = network.config.backbone_config.vision_config
        counts = []
        for batch in samples:
            targets, grids = batch.targets, batch["video_grid_thw"].tolist()
            device = targets.boxes.device
            frames = frame_mask([grid[0] for grid in grids], vision.temporal_patch_size, device)
            centres = network.memory_centres(tuple(grids[0][1:]), device)
            counts.append(count_labels(targets, (batch["labels"][:, 1:] != -100).sum(), frames, centres))
        if counts:
            total = self._sum_over_ranks(torch.stack(counts).sum(0).to(self.args.device))
            self._labels = LabelCounts(*total.tolist())
            self._batches = len(counts) * self.args.world_size
        return samples, items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: TrainingBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        output = model(**inputs.inputs, return_loss=False)
        matched = self.match_after is not None and self.state.global_step >= self.match_after
        weights = self.loss_weights(self.state.global_step)
        sums = loss_sums(output, inputs.targets, weights, match_one=matched)
        losses = mean_losses(sums, self._labels, self._batches)
        if not losses:
            raise SampleError(f"Step {self.state.global_step + 1} has no sample with any label to learn from.")
        total = sum(getattr(weights, name) * value for name, value in losses.items())
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1
        return (total, output) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every loss term since the last entry."""
        if "loss" in logs and self._sums:
            sums = self._sum_over_ranks(torch.stack(list(self._sums.values()))) / self.args.world_size
            for name, value in zip(self._sums, sums.tolist(), strict=True):
                logs[f"loss_{name}"] = round(value / self._counts[name], 4)
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)

    # Checkpoints -----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return f"{folder}/{STAGING}" if self._staging else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint in the staging folder, and move it to its name once every rank has written its share."""
        with saving(f"A checkpoint in {self.args.output_dir}"):
            if self.args.should_save:
                clear_staging(self.args.output_dir)
            self.accelerator.wait_for_everyone()
            self._staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(self.args.output_dir, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load through `from_pretrained`, as saved names differ from those of the modules."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        network = self.accelerator.unwrap_model(self.model if model is None else model)
        saved = type(network).from_pretrained(resume_from_checkpoint, config=network.config)
        network.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(Any, self.optimizer).optimizer
        load_sharded_optimizer(cast(torch.nn.Module, self.model), optimizer, Path(checkpoint) / "optimizer_0")
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        cast(Any, self.lr_scheduler).load_state_dict(schedule)

    def whole_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The weights gathered on rank 0; None where every rank holds them anyway."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        return self.accelerator.get_state_dict(self.model_wrapped)
