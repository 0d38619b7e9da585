"""The Trainer of this project: transformers' own, with our order of samples, parameter groups and checkpoints.

The loss of an optimizer step is the mean of its micro-batches' token means, as in the reference's training; with
`--loss_normalisation tokens` it is the mean over all its target tokens.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import FSDPModule, ShardedOptimStateDictConfig, ShardedStateDictConfig, StateDictType
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from llava.errors import library_errors
from llava.model.language_model import LlavaForCausalLM
from llava.model.weights.assemble import tied_weights
from llava.train.arguments import LlavaTrainingArguments
from llava.train.data.collator import META_KEYS
from llava.train.data.dataset import LlavaDataset, Report
from llava.train.data.sampler import EpochSampler
from llava.train.data.worker_errors import plain_worker_errors
from llava.train.lora import load_non_lora
from llava.train.output.checkpoints import publish, remove_old, staging_of
from llava.train.progress import ProgressBar
from llava.train.step import gpu
from llava.train.step.compute import activation_budget, compile_layers, set_policy
from llava.train.step.group_of_one import (
    KeptCopies,
    add_gradients_at_once,
    is_group_of_one,
    keep_copies,
    replicate_frozen,
    set_up_alone,
    train_rows_alone,
)
from llava.train.step.loss_watch import LossWatch
from llava.train.step.optimizers import (
    TORCHAO,
    on_own_parts,
    parameter_groups,
    takes_plain_tensors,
    with_float32_moments,
)
from llava.train.step.processes import of_all_processes
from llava.train.validation.held_out import Validation

logger = logging.getLogger(__name__)


class LlavaTrainer(Trainer):
    """Trainer for `LlavaDataset`.

    Args:
        write_model: `write_model(folder, state_dict or None)` writes the whole model in the project's layout.
        describe: `describe(sample number)` names a record in messages.
        attention: `attention()` is a context in which the model attends as its training batches need it.
        validation: what is measured where the flags say that it is time to evaluate.
    """

    args: LlavaTrainingArguments
    model: nn.Module
    progress: ProgressBar
    kept_copies: KeptCopies | None = None
    _is_compiled = False
    _adds_gradients_at_once = False
    _held_step = -1
    """The step at whose end a checkpoint was due that waits for the epoch's evaluation."""
    _staging_dir: str | None = None
    """Where a checkpoint is being written, until it gets its name."""

    def __init__(
        self,
        *args,
        write_model: Callable[[Path, dict | None], None],
        describe: Callable[[int], str],
        attention: Callable[[], AbstractContextManager] = nullcontext,
        validation: Validation | None = None,
        **kwargs,
    ):
        kwargs["eval_dataset"] = None if validation is None else validation.dataset
        use_cache = kwargs["model"].config.use_cache
        super().__init__(*args, **kwargs)
        # The library's has switched it off in the config, which is written with the model: others read it to generate.
        self.model.config.use_cache = use_cache or self.args.use_cache
        # Each micro-batch's own token mean, not a mean over the accumulated batch: the reference's arithmetic.
        self.model_accepts_loss_kwargs = False
        self.write_model = write_model
        self.loss_watch = LossWatch(describe)
        self.attention = attention
        self.validation = validation
        self.tokens_seen = 0
        self.samples_seen = 0
        self.data_seconds = 0.0
        """What this process has waited for batches."""
        self._targets_of_step: torch.Tensor | None = None
        self.report = Report()
        self._sampler: EpochSampler | None = None

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        args = self.args
        # One in groups (PackedDataset) is never sorted: `check_values` refuses that.
        dataset = cast(LlavaDataset, self.train_dataset if train_dataset is None else train_dataset)
        grouped = args.group_by_modality_length or args.train_sampling_strategy == "group_by_length"
        self._sampler = EpochSampler(
            len(dataset),
            args.seed if args.data_seed is None else args.data_seed,
            lengths=dataset.lengths() if grouped else None,
            is_image=dataset.has_image() if args.group_by_modality_length else None,
            batch_size=args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            shuffle=args.train_sampling_strategy != "sequential",
        )
        return self._sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Resumed from the checkpoint at which the run ended: early, or in the middle of an epoch.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            return None
        # accelerate passes the epoch on through some wrappers of a sampler and not through others.
        if self._sampler is not None:
            self._sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        set_policy(self.accelerator, is_tied=bool(getattr(self.model.config, "tie_word_embeddings", False)))

    def train(self, *args, **kwargs):
        self._began = time.monotonic()
        with self.attention(), activation_budget(self.args.activation_memory_budget):
            output = super().train(*args, **kwargs)
        self.loss_watch.look()
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "train_runtime" in logs:
            # The Trainer takes its times from the clock of the day, which may have been set meanwhile.
            seconds = max(time.monotonic() - self._began, 1e-9)
            logs["train_runtime"] = round(seconds, 4)
            logs["train_samples_per_second"] = round(self.samples_seen * self.args.world_size / seconds, 3)
            logs.pop("train_steps_per_second", None)
        super().log(logs, *args, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        if self.args.compile_layers and not self._is_compiled:
            self._is_compiled = True
            # The CPU's attention goes from sample to sample, which is no graph.
            compile_layers(self.model, fullgraph=gpu.is_on_gpu(self.args.device), **self.args.compile_options)
        is_alone = is_group_of_one(self.accelerator)
        if is_alone:
            set_up_alone(self.accelerator.state.fsdp_plugin, self.model, self.args)
        elif self.args.keep_half_weights:  # False asks for nothing that isn't so
            logger.warning("--keep_half_weights has no effect: this isn't one GPU in half precision (or it offloads)")
        if not is_alone:
            replicate_frozen(self.accelerator, self.model, self.args)
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if is_alone and not self._adds_gradients_at_once:
            self._adds_gradients_at_once = True
            add_gradients_at_once(model)
            self.kept_copies = keep_copies(self.args, model)
        if self._trained_rows:
            embedding = cast(LlavaForCausalLM, self.model).get_input_embeddings()
            train_rows_alone(self.model, embedding.weight, self._trained_rows)
        return model, loader

    @property
    def _trained_rows(self) -> Sequence[int]:
        return getattr(self.model, "trained_rows", ())

    def training_step(self, model, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        meta = {key: inputs.pop(key) for key in META_KEYS}
        if self.kept_copies is not None:
            self.kept_copies.begin_micro_batch(is_last=self.accelerator.sync_gradients)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_watch.note(loss, self.state.global_step + 1, meta["sample_numbers"])
        self.tokens_seen += meta["num_tokens"]
        self.samples_seen += len(meta["sample_numbers"])
        self.report.add_batch(meta["report"])
        return loss

    def get_batch_samples(self, *args, **kwargs):
        started = time.monotonic()
        with plain_worker_errors():
            batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.data_seconds += time.monotonic() - started
        if self.args.loss_normalisation == "tokens":
            self._targets_of_step = self._count_targets(batches)
        return batches, num_items

    def _count_targets(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Target tokens of an optimizer step over all processes: a float32 scalar on the device, nothing waited for."""
        own = sum(batch["target_positions"].shape[0] for batch in batches)
        count = torch.full((), float(own), device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(count)
        return count.clamp_(min=1)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._targets_of_step is None:
            return loss
        # Gradients are averaged over processes, and the Trainer divides by the micro-batches.
        times = self.args.world_size * self.current_gradient_accumulation_steps
        return loss * (inputs["target_positions"].shape[0] * times / self._targets_of_step)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """What `validation` measures now, logged; the weights are as before, and so are the random numbers."""
        if self.validation is None:
            raise ValueError("this trainer was made without held-out records")
        metrics = self.validation.measure(self)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def idle_seconds(self) -> float:
        """What evaluations have taken of this process's time."""
        return 0.0 if self.validation is None else self.validation.seconds

    def model_for_validation(self) -> nn.Module:
        """What to call for held-out losses, in evaluation mode; DDP's wrapper has nothing to do there."""
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        model.eval()
        if callable(switch := getattr(self.optimizer, "eval", None)):
            switch()
        return model

    def sum_over_processes(self, values: list[float]) -> list[float]:
        """Each number's sum over all processes, on all of them."""
        return [sum(column) for column in zip(*of_all_processes(values))]

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.loss_watch.look()
        holds = self._is_saved_after_evaluation()
        if holds:
            control.should_save = False
            self._held_step = self.state.global_step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if holds:
            self.control.should_save = True

    def _is_saved_after_evaluation(self) -> bool:
        """Whether the checkpoint of an epoch's last step waits for the epoch's evaluation, which follows at once.

        A run that was killed in that evaluation would else resume after it.
        """
        at_end = self.args.eval_strategy == IntervalStrategy.EPOCH and float(self.state.epoch or 0.5).is_integer()
        is_due = self.control.should_save and not self.control.should_evaluate
        return at_end and is_due and self._held_step != self.state.global_step

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            wrapped = self.model if model is None else model
            name = OptimizerNames(self.args.optim).value
            with library_errors(f"--optim {name} can't be used here"):
                optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, wrapped))
            if takes_plain_tensors(name):
                optimizer_cls = on_own_parts(optimizer_cls)
            elif name in TORCHAO:
                optimizer_cls = with_float32_moments(optimizer_cls)
                kwargs["bf16_stochastic_round"] = not self.args.master_weights
            self.optimizer = optimizer_cls(self.parameter_groups(wrapped), **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        with library_errors("--lr_scheduler_type can't be used as it is given"):
            return super().create_scheduler(num_training_steps, optimizer)

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """Groups by learning rate (projector and tower may have their own) and by weight decay."""
        decayed = set(self.get_decay_parameter_names(model))
        if self._trained_rows:  # decay would change the others too
            decayed = {name for name in decayed if not name.endswith("embed_tokens.weight")}
        return parameter_groups(
            model,
            decayed=decayed,
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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._in_parts():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._in_parts():
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _in_parts(self) -> Iterator[None]:
        """Within, every process saves and loads its own part of sharded weights and moments, where the moments can't be
        put together: torchao's."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or OptimizerNames(self.args.optim).value not in TORCHAO:
            yield
            return
        names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
        before = {name: getattr(plugin, name) for name in names}
        parts = (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(True), ShardedOptimStateDictConfig(True))
        vars(plugin).update(zip(names, parts))
        try:
            yield
        finally:
            vars(plugin).update(before)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._in_parts():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable:
            # The Trainer loads the adapter; the projector next to it is loaded here.
            load_non_lora(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = self._best_checkpoint()
        if best is None:
            logger.warning(
                "the best checkpoint (step %s) is gone; the last weights are kept", self.state.best_global_step
            )
            return
        self.state.best_model_checkpoint = str(best)
        with self._in_parts():
            super()._load_best_model()
        if self.args.lora_enable:
            load_non_lora(self.model, best)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Say what a checkpoint has too much or too little, but for where ours differ from what the model holds: they
        have the tower's last layers, which aren't run, and tied weights once."""
        model: Any = self.model
        expected = model.get_vision_tower().unused_layer_names | tied_weights(model).keys()
        unexpected, missing = (
            [name for name in names if name not in expected]
            for names in (load_result.unexpected_keys, load_result.missing_keys)
        )
        super()._issue_warnings_after_load(_IncompatibleKeys(missing, unexpected))

    def _best_checkpoint(self) -> Path | None:
        """Where the best checkpoint lies, found by its step: the folder may have been moved since."""
        if not self.state.best_global_step:
            return None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        return folder if folder.is_dir() else None

    def _get_output_dir(self, trial) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """The Trainer's checkpoint, written aside and renamed when every process is done."""
        final = Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        staging = staging_of(final, main_process=self.args.should_save)
        self.wait_for_all()
        self._staging_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging_dir = None
        self.wait_for_all()
        if self.state.best_model_checkpoint is not None:  # not the place where it is being written
            self.state.best_model_checkpoint = str(final.with_name(f"checkpoint-{self.state.best_global_step}"))
        if self.args.should_save:
            inner = staging / final.name
            self.state.save_to_json(str(inner / "trainer_state.json"))
            publish(inner, final)
            staging.rmdir()
            remove_old(final.parent, self.args.save_total_limit, self._best_checkpoint())
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """A barrier, where there are other processes."""
        if self.args.world_size > 1:
            torch.distributed.barrier()
