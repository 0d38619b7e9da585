"""Judging chat answers with a language model: the question put to the judge, and what its reply is worth.

The protocol is LLaVA-Med's (paper, section 5.1): the judge sees the figure's text, never the image, and rates the
stored reference answer and the model's. The wording is this project's own.
"""

import math
import re

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.openai_api import ChatJob, ChatResult
from llava.records import Record

ROLE = (
    "You are a careful and impartial judge of answers to questions about medical pictures. You don't see the picture; "
    "you are given the text that describes it."
)

TASK = """\
Two assistants answered the question above about the image. Rate each answer on how helpful, relevant, accurate and
detailed it is, given the text about the image. Each gets one overall score from 1 to 10; higher is better.

On the first line write the two scores and nothing else: Assistant 1's, a blank, Assistant 2's.
Then, from the second line on, explain the scores. Be free of bias, and don't let the order of the answers count."""

REPAIR = (
    "Your first line could not be read. Write your reply again: on the first line only two numbers from 1 to 10 with a "
    "blank between them, Assistant 1's score and then Assistant 2's; the explanation after it."
)

_NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(?:\s*/\s*10)?(?![\w.]*\d)")
_LABEL = re.compile(r"assistant\s*[12]", re.IGNORECASE)


def build_job(question: Record, answer: Record, swapped: bool = False) -> ChatJob:
    """The request that judges one answer; `swapped` puts the model's answer first."""
    answers = [question["gpt4_answer"], answer["text"]]
    if swapped:
        answers.reverse()
    label = question.get("fig_label") or "Figure"
    parts = ["[Text about the picture]", f"{label}: {question.get('fig_caption') or ''}"]
    parts += [f"{label} in the article: {mention}" for mention in mentions(question)]
    parts += ["", "[Question]", question_text(question)]
    for number, text in enumerate(answers, 1):
        parts += ["", f"[Assistant {number}]", text.strip(), f"[End of Assistant {number}]"]
    parts += ["", "[Task]", TASK]
    messages = [{"role": "system", "content": ROLE}, {"role": "user", "content": "\n".join(parts)}]
    return ChatJob(judgement_key(question["question_id"], swapped), messages, temperature=0.0, max_tokens=1024)


def are_read(scores: tuple[float, float]) -> bool:
    """Whether both scores of a reply could be read."""
    return all(map(math.isfinite, scores))


def judgement_key(question_id, swapped: bool) -> str:
    """Names one judgement in the scores file: the question, and the order of asking."""
    return f"{question_id}{' swapped' if swapped else ''}"


def repair_job(job: ChatJob, result: ChatResult) -> ChatJob | None:
    """One more request where the reply holds no scores, None where it does."""
    if result.refused or are_read(read_scores(result.text)):
        return None
    repeated = [{"role": "assistant", "content": result.text}, {"role": "user", "content": REPAIR}]
    return ChatJob(job.key, [*job.messages, *repeated], job.temperature, job.max_tokens)


def read_scores(reply: str) -> tuple[float, float]:
    """(Assistant 1's score, Assistant 2's) of the first line that isn't blank; (nan, nan) if they aren't there.

    Tolerant of "8/10 7/10", "8, 7", "Assistant 1: 8 Assistant 2: 7" and bold type, not of a line with other numbers.
    """
    line = next((line for line in reply.splitlines() if line.strip()), "")
    numbers = [float(number) for number in _NUMBER.findall(_LABEL.sub(" ", line.replace("*", " ")))]
    if len(numbers) != 2 or not all(0 <= number <= 10 for number in numbers):
        return math.nan, math.nan
    return numbers[0], numbers[1]


def question_text(question: Record) -> str:
    """The question as it was asked, without the placeholder of its image."""
    return question["text"].replace(DEFAULT_IMAGE_TOKEN, "").strip()


def mentions(question: Record) -> list[str]:
    """The sentences of the article about the figure; 14 rows of the released file have none."""
    found = []
    given = question.get("in_text_mention") or []
    for mention in given if isinstance(given, (list, tuple)) else [given]:
        text = mention.get("tokens") if isinstance(mention, dict) else mention
        if text:
            found.append(str(text).strip())
    return found
