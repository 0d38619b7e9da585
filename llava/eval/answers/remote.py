"""Answers from an OpenAI-compatible server (vLLM, SGLang, a commercial model), images sent with the question."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError
from llava.eval.answers.ablation import QuestionImages
from llava.eval.answers.answering import answer_record
from llava.eval.answers.questions import Question
from llava.images import open_image, png_data_url
from llava.openai_api import ApiSettings, ChatJob, ChatResult, run_jobs
from llava.resumable import ResumableJsonl
from llava.sampling_params import SamplingParams

_OWN_FIELDS = ("temperature", "seed")  # of ChatJob
_ASKED_AT_ONCE = 512  # questions whose images are held in memory


class RemoteAnswers:
    """Fills an answer file from a server (see `answering.answer_questions`).

    Raises:
        LlavaError: beam search is asked for, which no such server does.
    """

    def __init__(self, settings: ApiSettings, question_images: QuestionImages, sampling: SamplingParams):
        self.settings, self.question_images, self.sampling = settings, question_images, sampling
        if sampling.num_beams > 1:
            raise LlavaError("--num_beams: an OpenAI-compatible server does no beam search; leave it at 1")

    def __call__(self, questions: Sequence[Question], output: ResumableJsonl) -> dict[str, Any]:
        by_id = {question.id: question for question in questions}

        def to_record(job: ChatJob, result: ChatResult):
            metadata: dict[str, Any] = {"finish_reason": result.finish_reason, "tokens": result.completion_tokens}
            if result.refused:
                metadata["refused"] = result.refused
            metadata |= self.question_images.metadata(by_id[job.key])
            return answer_record(by_id[job.key], result.text.strip(), self.settings.model, metadata)

        for start in range(0, len(questions), _ASKED_AT_ONCE):
            todo = [q for q in questions[start : start + _ASKED_AT_ONCE] if q.id not in output.done]
            summary = run_jobs(
                [self.job(question) for question in todo], self.settings, output, to_record, progress="answers"
            )
            if not summary.complete:
                raise LlavaError(f"not all questions were answered ({summary}); run again to ask for the rest")
        return {"model_id": self.settings.model}

    def job(self, question: Question) -> ChatJob:
        """The request: the question's text and images in their order."""
        pieces = question.text.split(DEFAULT_IMAGE_TOKEN)
        content: list[dict[str, Any]] = []
        for piece, source in zip(pieces, [*self.question_images.of(question), None]):
            if piece.strip():
                content.append({"type": "text", "text": piece.strip()})
            if source is not None:
                content.append({"type": "image_url", "image_url": {"url": _data_url(source)}})
        system = [] if question.system is None else [{"role": "system", "content": question.system}]
        return ChatJob(
            key=question.id,
            messages=[*system, {"role": "user", "content": content}],
            temperature=self.sampling.temperature,
            max_tokens=self.sampling.max_new_tokens,
            seed=self.sampling.seed,
            more={name: value for name, value in self.sampling.openai_fields().items() if name not in _OWN_FIELDS},
        )


def _data_url(source: Any) -> str:
    """The image as the server can read it: our own reading of it (DICOM, 16 bit, …), without loss, as PNG."""
    image = source if isinstance(source, Image.Image) else open_image(source)
    return png_data_url(image)
