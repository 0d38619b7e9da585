"""Answers from a checkpoint on this machine, through the one engine of llava.generation."""

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava.bars import tqdm
from llava.conversation import get_template
from llava.eval.answers.ablation import QuestionImages
from llava.eval.answers.answering import answer_record
from llava.eval.answers.questions import Question
from llava.folders import model_name
from llava.record_content import OPTION_LETTERS
from llava.resumable import ResumableJsonl
from llava.sampling_params import SamplingParams
from llava.tokenization import conversation_from_record

log = logging.getLogger(__name__)

SAVE_EVERY = 128
"""Questions per group. Groups are the same after a restart, so a batch never depends on when a run was killed."""

ANSWER_PROMPT = "ANSWER:"
"""What --answer-prompter says once the model has answered at length."""


@dataclass(frozen=True)
class LocalModel:
    """Which checkpoint to load and how."""

    path: str
    base: str | None = None
    vision_tower: str | None = None
    template: str | None = None
    device: str | None = None
    dtype: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False

    @property
    def model_id(self) -> str:
        """What answers say of who gave them."""
        return model_name(self.path)

    def load(self):
        """The loaded model (llava.model.LoadedModel)."""
        from llava.model import load_pretrained_model

        options = {key: value for key, value in asdict(self).items() if key not in {"path", "base", "template"}}
        return load_pretrained_model(self.path, self.base, conversation_template=self.template, **options)


class LocalAnswers:
    """Fills an answer file group by group (see `answering.answer_questions`).

    Args:
        question_images: of the questions.
        answer_prompter: ask a second time for the answer alone, and append it to the first answer.
        yes_no_probabilities: write each closed question's probability of yes against no too.
        option_likelihoods: write how likely each option of a multiple-choice question is too, as letter and as text.
    """

    def __init__(
        self,
        model: LocalModel,
        question_images: QuestionImages,
        sampling: SamplingParams,
        *,
        batch_size: int = 32,
        save_every: int | None = None,
        answer_prompter: bool = False,
        yes_no_probabilities: bool = False,
        option_likelihoods: bool = False,
    ):
        self.model, self.question_images, self.sampling = model, question_images, sampling
        self.batch_size, self.save_every = batch_size, save_every or SAVE_EVERY
        self.answer_prompter, self.yes_no_probabilities = answer_prompter, yes_no_probabilities
        self.option_likelihoods = option_likelihoods

    def __call__(self, questions: Sequence[Question], output: ResumableJsonl) -> dict[str, Any]:
        from llava.generation import Engine

        if self.yes_no_probabilities:
            from llava.eval.answers.yes_no import check_tokens

            if untyped := sum(question.answer_type is None for question in questions):
                log.warning(
                    "%d of %d questions say neither OPEN nor CLOSED; --yes-no-probabilities writes none for them: "
                    'give each an "answer_type"', untyped, len(questions),
                )  # fmt: skip

            check_tokens(self.model.path, self.model.base, self.model.vision_tower, self.model.template)
        loaded = self.model.load()
        engine = Engine(loaded, max_batch_size=self.batch_size)
        template = get_template(self.model.template or loaded.model.config.conversation_template)
        groups = [questions[start : start + self.save_every] for start in range(0, len(questions), self.save_every)]
        with tqdm(total=len(questions), desc="answers", unit="answer", disable=None) as bar:
            for group in groups:
                # A group that was half written is answered whole: the same batches give the same answers.
                if any(question.id not in output.done for question in group):
                    for question, text, metadata in self._answer(group, engine, template):
                        if question.id not in output.done:
                            output.add(answer_record(question, text, self.model.model_id, metadata))
                bar.update(len(group))
        return {
            "model_id": self.model.model_id,
            "template": template.name,
            "image_aspect_ratio": loaded.model.config.image_aspect_ratio,
            "device": str(loaded.model.device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        }

    def _answer(self, group, engine, template) -> Iterator[tuple[Question, str, dict[str, Any]]]:
        images = [self.question_images.of(question) for question in group]
        conversations = [conversation_from_record(_turns(question), template) for question in group]
        answers = self._generate(engine, group, conversations, images)
        metadata: list[dict[str, Any]] = [
            {"finish_reason": a.finish_reason, "tokens": len(a.token_ids)} | self.question_images.metadata(question)
            for a, question in zip(answers, group)
        ]
        texts = [answer.text.strip() for answer in answers]
        if self.answer_prompter:
            for conversation, text in zip(conversations, texts):
                conversation.append_message(conversation.roles[1], text)
                conversation.append_message(conversation.roles[0], ANSWER_PROMPT)
            finals = self._generate(engine, group, conversations, images)
            texts = [f"{text}\n{ANSWER_PROMPT} {final.text.strip()}" for text, final in zip(texts, finals)]
            for about, final in zip(metadata, finals):
                about["tokens"] += len(final.token_ids)
                if final.finish_reason == "length":  # the text is cut, whichever of its two parts is
                    about["finish_reason"] = "length"
        if self.yes_no_probabilities:
            from llava.eval.answers.yes_no import yes_probabilities

            closed = [index for index, question in enumerate(group) if question.answer_type == "CLOSED"]
            asked = [(_turns(group[i]), images[i]) for i in closed]
            for index, chance in zip(closed, yes_probabilities(engine, template, asked, self.batch_size)):
                metadata[index]["p_yes"] = chance
        if self.option_likelihoods:
            from llava.eval.answers.likelihood import answer_likelihoods

            choices = [index for index, question in enumerate(group) if question.options]
            for kind in ("letter", "text"):
                offered = [(_turns(group[i]), images[i], _options(group[i], kind)) for i in choices]
                for index, found in zip(choices, answer_likelihoods(engine, template, offered, self.batch_size)):
                    metadata[index][f"option_{kind}s"] = [one._asdict() for one in found]
        return zip(group, texts, metadata)

    def _generate(self, engine, group, conversations, images) -> list:
        from llava.generation import Request

        return engine.generate(
            [
                Request(conversation, own_images, own_seed(self.sampling, question), question.id)
                for question, conversation, own_images in zip(group, conversations, images)
            ]
        )


def own_seed(sampling: SamplingParams, question: Question) -> SamplingParams:
    """Each question has random numbers of its own, whatever batch it is in."""
    return sampling.with_seed(zlib.crc32(f"{sampling.seed}/{question.id}".encode()))


def _options(question: Question, kind: str) -> list[str]:
    return list(OPTION_LETTERS[: len(question.options)] if kind == "letter" else question.options)


def _turns(question: Question) -> list[dict[str, str]]:
    system = [] if question.system is None else [{"from": "system", "value": question.system}]
    return [*system, {"from": "human", "value": question.text}]
