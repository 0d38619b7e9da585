"""Held-out questions answered by the model that is being trained: the engine's greedy answers, strictly scored.

The engine computes with the training's own weights. The only module of llava.train that imports llava.generation and
llava.eval.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import TensorBoardCallback, WandbCallback, is_deepspeed_zero3_enabled

from llava.conversation import Conversation, get_template
from llava.data.vqa_items import VqaItem, vqa_item
from llava.errors import LlavaError
from llava.eval.metrics import score_items
from llava.eval.metrics.joined import JoinedItem
from llava.generation import Engine, Request, SamplingParams
from llava.model import LoadedModel
from llava.model.language_model import LlavaForCausalLM
from llava.record_content import plain_entries
from llava.records import write_records
from llava.tokenization import conversation_from_record
from llava.train.data.dataset import LlavaDataset
from llava.train.step.processes import of_all_processes
from llava.train.validation.flags import ANSWER_METRICS, ANSWERS

logger = logging.getLogger(__name__)

SHOWN = 20
"""Answers in TensorBoard's table."""


class HeldOutAnswers:
    """Answers a fixed choice of held-out questions, the first of each record, spread evenly over the file.

    Args:
        count: of questions (all, where there are fewer).
        max_new_tokens: of an answer.

    Raises:
        LlavaError: a record isn't a question with an answer; it is named.
    """

    def __init__(self, loaded: LoadedModel, dataset: LlavaDataset, count: int, max_new_tokens: int):
        self.loaded = loaded
        self.dataset = dataset
        self.sampling = SamplingParams(max_new_tokens=max_new_tokens)
        self.template = get_template(loaded.model.config.conversation_template)
        places = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int))
        self.numbers = [int(dataset.numbers[place]) for place in places]
        self.items: list[VqaItem] = [
            vqa_item(dataset.store[number], dataset.describe(number)) for number in self.numbers
        ]

    def require(self, metric: str | None) -> None:
        """Refuse a `--metric_for_best_model` that these questions don't have.

        Raises:
            LlavaError: no question of the kind that counts.
        """
        kind = ANSWER_METRICS.get((metric or "").removeprefix("eval_"))
        if kind is not None and all(item.answer_type != kind for item in self.items):
            raise LlavaError(
                f"--metric_for_best_model {metric}: none of --eval_generate's {len(self.items)} questions is {kind}; "
                "ask more of them, or choose another metric"
            )

    def __call__(self, trainer) -> dict[str, float]:
        """The strict metrics in percent, the same on every process; each answers a part of the questions."""
        rank, processes = trainer.args.process_index, trainer.args.world_size
        own = range(rank, len(self.items), processes)
        requests = [self._request(index) for index in own]
        with whole_weights(trainer) as model:
            engine = Engine(self.loaded._replace(model=cast(LlavaForCausalLM, model)), prefix_bytes=0, paged=False)
            answers = [answer.text for answer in engine.generate(requests)]
        texts = dict(chain(*of_all_processes(list(zip(own, answers, strict=True)))))
        joined = [JoinedItem(item, texts[index]) for index, item in enumerate(self.items)]
        if trainer.is_world_process_zero():
            self._show(trainer, [(entry.item.question, entry.item.answer, entry.prediction) for entry in joined])
        scores = score_items(joined, resamples=0)
        found = {name: scores.headline("strict", kind.lower()).value for name, kind in ANSWER_METRICS.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _request(self, index: int) -> Request:
        record = self.dataset.store[self.numbers[index]]
        source = self.dataset.image_source
        images = [source.read(image) for image in self.items[index].images]
        return Request(self._conversation(record), images, self.sampling, self.items[index].id)

    def _conversation(self, record) -> Conversation:
        entries = plain_entries(record)
        asked = next(place for place, entry in enumerate(entries) if entry["from"] == "human")
        system = [entry for entry in entries[:1] if entry["from"] == "system"]
        return conversation_from_record({"conversations": [*system, entries[asked]]}, self.template)

    def _show(self, trainer, rows: Sequence[tuple[str, str, str]]) -> None:
        """The answers as a file in the output folder, and as tables where the run reports to."""
        step = trainer.state.global_step
        folder = Path(trainer.args.output_dir) / ANSWERS
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"question_id": item.id, "question": question, "reference": reference, "text": text}
            for item, (question, reference, text) in zip(self.items, rows, strict=True)
        ]
        write_records(folder / f"step-{step}.jsonl", lines)
        columns = ["question", "reference", "answer"]
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("eval/answers", _markdown(columns, rows[:SHOWN]), step)
            if isinstance(callback, WandbCallback) and callback._wandb is not None:
                table = callback._wandb.Table(columns=columns, data=[list(row) for row in rows])
                callback._wandb.log({"eval/answers": table, "train/global_step": step})


@contextmanager
def whole_weights(trainer) -> Iterator[nn.Module]:
    """The model that is being trained, for calls of its parts in any order; sharded weights are gathered within.

    Nothing is copied: without sharding these are the training's weights, and with FSDP 2 or ZeRO-3 what each layer
    gathers to compute with, here all at once.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    gathered = _gathered_by_zero if is_deepspeed_zero3_enabled() else _gathered_by_fsdp
    with gathered(trainer):
        yield model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _gathered_by_fsdp(trainer) -> Iterator[None]:
    shards = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        # Else a part that is called would give its weights back, and wait for other processes when called again.
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(trainer.accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)
            module.reshard()
        if trainer.kept_copies is not None:
            trainer.kept_copies.set_up()


@contextmanager
def _gathered_by_zero(trainer) -> Iterator[None]:
    import deepspeed

    offload = trainer.model_wrapped.optimizer.parameter_offload
    parameters = list(offload.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        # These hooks would do as FSDP's do.
        for hooks in (offload.forward_hooks, offload.backward_hooks):
            for hook in hooks:
                hook.remove()
            hooks.clear()
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            offload._register_deepspeed_module(offload.module)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what would end a cell or a line of it is written otherwise."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
