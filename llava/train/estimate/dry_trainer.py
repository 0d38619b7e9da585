"""The real Trainer on tensors without content, watched."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import TrainerCallback

from llava.model.weights.assemble import tied_weights
from llava.train.estimate.checkpoint import Checkpoint, written_nowhere
from llava.train.estimate.costs import Work
from llava.train.estimate.tracker import Tracker, note_all
from llava.train.estimate.world import tell_parameters_apart, without_content
from llava.train.step.loss_watch import LossWatch
from llava.train.trainer import LlavaTrainer


@dataclass
class Taken:
    """What a part of a step took."""

    seconds: float
    work: Work
    waits: int
    operators: int
    tokens: int = 0
    samples: int = 0


class FakeBatches:
    """A data loader's batches without their content; the borders' squares are noted before they are gone."""

    def __init__(self, loader, trainer: "DryTrainer"):
        self.loader, self.trainer = loader, trainer

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        with unset_fake_temporarily():
            batches = iter(self.loader)
        while True:
            with unset_fake_temporarily():
                batch = next(batches, None)
                if batch is None:
                    return
                batch["dry_pairs"] = _pairs(batch)
            yield without_content(self.trainer.mode, batch)


def _pairs(batch: dict[str, Any]) -> int:
    if "cu_seq_lens_q" not in batch:
        return 0
    lengths = zip(batch["cu_seq_lens_q"].diff().tolist(), batch["cu_seq_lens_k"].diff().tolist())
    return sum(own * (seen - own) + own * (own + 1) // 2 for own, seen in lengths)


class DryTrainer(LlavaTrainer):
    """One optimizer step of the real Trainer, and its checkpoint; nothing is written.

    Attributes:
        micro_batches: what each took.
        rest: what came after them: clipping, the optimizer.
        attention_name: what transformers knows the language model's attention by.
        gradient_dtypes: of the sums that the optimizer gets.
        checkpoint: what writing one took.
    """

    def watch(self, mode: FakeTensorMode, tracker: Tracker, micro_batch_done: Callable[[], object]) -> None:
        """Set up before `train()`, which is to be called inside both modes."""
        self.mode, self.tracker, self.micro_batch_done = mode, tracker, micro_batch_done
        self.micro_batches: list[Taken] = []
        self.rest: Taken | None = None
        self.checkpoint = Checkpoint()
        self.loss_watch = UncheckedLosses(self.loss_watch.describe)
        self.add_callback(_Phases(self))

    def get_train_dataloader(self):
        with unset_fake_temporarily():
            loader = super().get_train_dataloader()
        return FakeBatches(loader, self)

    def _move_model_to_device(self, model, device) -> None:
        """Tensors without content are where they belong."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.device_placement = False
        prepare = self.accelerator.prepare

        def prepare_with_content(*parts, **kwargs):
            tell_parameters_apart(self.model)
            if not self.is_fsdp_enabled:
                return prepare(*parts, **kwargs)
            # Meshes of processes need content; the model's own tensors have none in whichever mode they are used.
            with unset_fake_temporarily():
                return prepare(*parts, **kwargs)

        self.accelerator.prepare = prepare_with_content

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tracker.pairs = inputs.pop("dry_pairs")
        tokens, samples, begun = inputs["num_tokens"], len(inputs["sample_numbers"]), Mark(self.tracker)
        self.attention_name = self.accelerator.unwrap_model(model).config._attn_implementation
        loss = super().training_step(model, inputs, num_items_in_batch)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        note_all(self.tracker.memory, gradients, "gradients")
        self.gradient_dtypes = {gradient.dtype for gradient in gradients}
        self.micro_batches.append(replace(begun.passed(), tokens=tokens, samples=samples))
        self.after_micro_batches = Mark(self.tracker)
        self.micro_batch_done()
        return loss

    def _get_learning_rate(self) -> float:
        """For the log; where a rate is a tensor, it lies on the CPU in a real run, and nothing is waited for."""
        return self.args.learning_rate

    def _save_checkpoint(self, model, trial) -> None:
        """Gather what a checkpoint holds, as for a real one; the folder is a passing one and gets no file."""
        folder = str(self.args.output_dir)
        with written_nowhere(self.checkpoint, self.tracker, self.args.world_size):
            self.save_model(folder, _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Count the model's own files: of adapters only what is trained."""
        if not self.args.should_save:
            return
        model: Any = self.model
        state = model.state_dict() if state_dict is None else state_dict
        if self.args.lora_enable:
            left_out = {name for name, one in model.named_parameters() if not one.requires_grad}
        else:
            left_out = set(tied_weights(model))
        self.checkpoint.add(state, self.args.world_size, left_out)


class UncheckedLosses(LossWatch):
    """Losses without values; looking at them waits for the GPU as ever."""

    def look(self) -> None:
        if self._losses:
            torch.stack(self._losses).sum().item()
        self._losses.clear()
        self._batches.clear()


class Mark:
    """A moment, to count from."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.work = tracker.work = Work()
        self.before = tracker.clock.now, tracker.waits.total(), tracker.operators

    def passed(self) -> Taken:
        """What has been taken since, if no later mark was made."""
        tracker = self.tracker
        seconds, waits, operators = self.before
        return Taken(tracker.clock.now - seconds, self.work, tracker.waits.total() - waits,
                     tracker.operators - operators)  # fmt: skip


class _Phases(TrainerCallback):
    def __init__(self, trainer: DryTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        optimizer: Any = trainer.optimizer
        allocate_moments(trainer.model, getattr(optimizer, "optimizer", optimizer), trainer.tracker)
        trainer.tracker.memory.restart()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.rest = self.trainer.after_micro_batches.passed()
        control.should_save = True


def allocate_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tracker: Tracker) -> None:
    """Let the optimizer make its state, as it has it from the second step on, and say what each storage is."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with tracker.paused():
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    note_all(tracker.memory, model.parameters(), "weights")
    note_all(tracker.memory, model.buffers(), "buffers")
    for state in optimizer.state.values():
        note_all(tracker.memory, (one for one in state.values() if isinstance(one, torch.Tensor)), "moments")
