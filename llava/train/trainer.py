"""The Trainer of this project: transformers' own, with our order of samples, parameter groups and checkpoints.

The loss of an optimizer step is the mean of its micro-batches' token means, as in the reference's training.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from transformers import Trainer

from llava.train import gpu
from llava.train.checkpoints import publish, remove_old, staged
from llava.train.compute import compile_layers, set_policy
from llava.train.data.dataset import Report
from llava.train.data.sampler import EpochSampler
from llava.train.group_of_one import add_gradients_at_once, is_group_of_one, keeps_copies
from llava.train.lora import load_non_lora
from llava.train.loss_watch import LossWatch

logger = logging.getLogger(__name__)

PROJECTOR = "mm_projector"
TOWER = "vision_tower"
META_KEYS = ("sample_numbers", "num_tokens", "report")
"""What the collator adds for us and the model never sees."""


class LlavaTrainer(Trainer):
    """Trainer for `LlavaDataset`.

    Args:
        write_model: `write_model(folder, state_dict or None)` writes the whole model in the project's layout.
        describe: `describe(sample number)` names a record in messages.
        attention: `attention()` is a context in which the model attends as its training batches need it.
    """

    def __init__(
        self,
        *args,
        write_model: Callable[[Path, dict | None], None],
        describe: Callable[[int], str],
        attention: Callable[[], AbstractContextManager] = nullcontext,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # Each micro-batch's own token mean, not a mean over the accumulated batch: the reference's arithmetic.
        self.model_accepts_loss_kwargs = False
        self.write_model = write_model
        self.loss_watch = LossWatch(describe)
        self.attention = attention
        self.tokens_seen = 0
        self.samples_seen = 0
        self.report = Report()
        self._sampler: EpochSampler | None = None

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        args = self.args
        dataset = self.train_dataset if train_dataset is None else train_dataset
        grouped = args.group_by_modality_length or args.train_sampling_strategy == "group_by_length"
        self._sampler = EpochSampler(
            len(dataset),
            args.seed if args.data_seed is None else args.data_seed,
            lengths=dataset.lengths() if grouped else None,
            is_image=dataset.has_image() if args.group_by_modality_length else None,
            batch_size=args.train_batch_size * args.world_size,
            shuffle=args.train_sampling_strategy != "sequential",
        )
        return self._sampler

    def _run_epoch(self, *, epoch: int, **kwargs):
        # accelerate passes the epoch on through some wrappers of a sampler and not through others.
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        return super()._run_epoch(epoch=epoch, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        set_policy(self.accelerator)

    def train(self, *args, **kwargs):
        with self.attention():
            output = super().train(*args, **kwargs)
        self.loss_watch.look()
        return output

    def _prepare_for_training(self, *args, **kwargs):
        if self.args.compile_layers and not self._is_compiled:
            self._is_compiled = True
            # The CPU's attention goes from sample to sample, which is no graph.
            compile_layers(self.model, fullgraph=gpu.is_on_gpu(self.args.device), **self.args.compile_options)
        is_alone = is_group_of_one(self.accelerator)
        if is_alone:
            self.keeps_copies = keeps_copies(self.args, self.model)
            self.accelerator.state.fsdp_plugin.reshard_after_forward = not self.keeps_copies
        elif self.args.keep_half_weights is not None:
            logger.warning("--keep_half_weights has no effect: this isn't one GPU in half precision (or it offloads)")
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if is_alone and not self._adds_gradients_at_once:
            self._adds_gradients_at_once = True
            add_gradients_at_once(model)
        return model, loader

    _is_compiled = False
    _adds_gradients_at_once = False
    keeps_copies = False
    """Of the weights in half precision, from the first micro-batch of a step to the last."""

    def training_step(self, model, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        meta = {key: inputs.pop(key) for key in META_KEYS}
        if self.keeps_copies:
            model.set_reshard_after_backward(self.accelerator.sync_gradients)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_watch.note(loss, self.state.global_step + 1, meta["sample_numbers"])
        self.tokens_seen += meta["num_tokens"]
        self.samples_seen += len(meta["sample_numbers"])
        self._note(meta["report"])
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.loss_watch.look()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _note(self, report: Report) -> None:
        """Count what was cut, has no target or was left out; an image that is left out is said at once."""
        for number, message in report.skipped.items():
            if number not in self.report.skipped:
                logger.warning("left out: %s", message)
        self.report.add(report)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            wrapped = self.model if model is None else model
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, wrapped)
            self.optimizer = optimizer_cls(self.parameter_groups(wrapped), **kwargs)
        return self.optimizer

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """Groups by learning rate (projector and tower may have their own) and by weight decay."""
        return parameter_groups(
            model,
            decayed=set(self.get_decay_parameter_names(model)),
            weight_decay=self.args.weight_decay,
            projector_lr=self.args.mm_projector_lr,
            tower_lr=self.args.mm_vision_tower_lr,
        )

    def floating_point_ops(self, inputs) -> int:
        """Not counted here: the Trainer's estimate walks over all parameters at every step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.write_model(folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable:
            # The Trainer knows the adapter; the projector beside it is ours.
            load_non_lora(self.model, Path(resume_from_checkpoint))

    def _get_output_dir(self, trial) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    _staging_dir: str | None = None

    def _save_checkpoint(self, model, trial) -> None:
        """The Trainer's checkpoint, written aside and renamed when every process is done."""
        final = Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with staged(final, main_process=self.args.should_save) as staging:
            self.wait_for_all()
            self._staging_dir = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging_dir = None
            self.wait_for_all()
            if self.args.should_save:
                inner = staging / final.name
                publish(inner, final)
                staging.rmdir()
                remove_old(final.parent, self.args.save_total_limit)
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """A barrier, where there are other processes."""
        if self.args.world_size > 1:
            torch.distributed.barrier()


def parameter_groups(
    model: nn.Module,
    *,
    decayed: set[str],
    weight_decay: float,
    projector_lr: float | None,
    tower_lr: float | None,
) -> list[dict]:
    """Optimizer groups of the trainable parameters: (own learning rate or the common one) × (decay or not).

    Groups come in the order language model, projector, tower, each with decay first; empty ones are left out.
    """
    rates = {"": None, PROJECTOR: projector_lr, TOWER: tower_lr}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {
        (part, decay): [] for part in rates for decay in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((key for key in (PROJECTOR, TOWER) if key in name and rates[key] is not None), "")
            members[part, name in decayed].append(parameter)
    groups = []
    for (part, decay), parameters in members.items():
        if not parameters:
            continue
        group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
        if rates[part] is not None:
            group["lr"] = rates[part]
        groups.append(group)
    return groups
