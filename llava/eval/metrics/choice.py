"""Multiple-choice questions: the option that an answer names, the likeliest one, and whether it stays when all move.

The record lists its `options`; the reference names the right one, by letter or text. Records that ask one question with
its options in several orders have the same `source_id` (`llava.data.convert mcq --orders`).
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from llava.errors import LlavaError
from llava.eval.metrics.joined import metadata_of
from llava.eval.metrics.registry import CHOICE, Answer, metric
from llava.eval.metrics.words import strict_words
from llava.record_content import OPTION_LETTERS, record_options


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """Which option an answer names, None if none or several.

    A letter counts alone, in brackets, before a mark or its option's text, or after "answer", "option" or "choice";
    "A mass" names no letter. Else the options' texts count, as whole words; of two that the answer holds, one inside
    the other, the longer. A letter with another option's text after it names none.
    """
    if not options:
        return None
    letters = OPTION_LETTERS[: len(options)]
    if alone := re.fullmatch(rf"\W*([{letters}{letters.lower()}])\W*", text):
        return letters.index(alone[1].upper())
    named = _named_by_letter(text, options, letters)
    told = _named_by_text(text, options)
    if len(named) == 1:
        (letter,) = named
        return None if told and letter not in told else letter
    return next(iter(told)) if not named and len(told) == 1 else None


def _named_by_letter(text: str, options: Sequence[str], letters: str) -> set[int]:
    lead = r"\b(?i:answer|option|choice)(?i:\s+is)?\W{0,3}"
    found = re.findall(rf"^\W*([{letters}])\s*[.:)\]]", text)
    found += re.findall(rf"^\W*([{letters}])\s*,(?!\s*[{letters}]\b)", text)
    found += re.findall(rf"[(\[]([{letters}])[)\]]", text)
    found += re.findall(rf"{lead}([{letters}])(?![\w'])", text)
    found += re.findall(rf"{lead}([{letters.lower()}])\W*$", text)
    for letter, option in zip(letters, options):
        if re.match(rf"\W*{letter}\W+{re.escape(option)}(?!\w)", text, re.IGNORECASE):
            found.append(letter)
    return {letters.index(letter.upper()) for letter in found}


def _named_by_text(text: str, options: Sequence[str]) -> set[int]:
    said = strict_words(text)
    words = [strict_words(option) for option in options]
    there = {index for index, option in enumerate(words) if option and _holds(said, option)}
    inside = {
        short
        for short in there
        for longer in there
        if len(words[short]) < len(words[longer]) and _holds(words[longer], words[short])
    }
    return there - inside


def _holds(text: list[str], words: list[str]) -> bool:
    return any(text[start : start + len(words)] == words for start in range(len(text) - len(words) + 1))


def _options(answer: Answer) -> list[str]:
    return record_options(answer.fields)


def _right(answer: Answer) -> int:
    options = _options(answer)
    right = chosen_option(answer.reference, options)
    if right is None:
        raise LlavaError(
            f'question "{answer.id}": its answer {answer.reference!r} names none of its "options" {options}'
        )
    return right


def _chosen(answer: Answer) -> int | None:
    return chosen_option(answer.prediction, _options(answer))


def _likeliest(answer: Answer, kind: str) -> int | None:
    """The option of the highest log probability per token, None where the answers were made without likelihoods."""
    name = f"option_{kind}s"
    found = metadata_of(answer.record).get(name)
    if found is None:
        return None
    options = _options(answer)
    if len(found) != len(options):
        raise LlavaError(
            f'question "{answer.id}": its answer has {len(found)} "{name}" for {len(options)} options; '
            f"answer these questions again with --option-likelihoods"
        )
    scores = [one["log_probability"] / max(1, one["tokens"]) for one in found]
    return max(range(len(scores)), key=scores.__getitem__)


@metric("choice accuracy", counts=CHOICE, label="choice: accuracy")
def choice_accuracy(answer: Answer) -> float:
    return float(answer.once(_chosen) == answer.once(_right))


@metric("choice unreadable", counts=CHOICE, label="choice: names no option, or several", higher_is_better=False)
def choice_unreadable(answer: Answer) -> float:
    return float(answer.once(_chosen) is None)


@metric("choice accuracy by letters", counts=CHOICE, label="choice: accuracy of the likeliest letter")
def choice_accuracy_by_letters(answer: Answer) -> float | None:
    likeliest = _likeliest(answer, "letter")
    return None if likeliest is None else float(likeliest == answer.once(_right))


@metric("choice accuracy by texts", counts=CHOICE, label="choice: accuracy of the likeliest text")
def choice_accuracy_by_texts(answer: Answer) -> float | None:
    likeliest = _likeliest(answer, "text")
    return None if likeliest is None else float(likeliest == answer.once(_right))


@metric("choice consistency", counts=CHOICE, label="choice: same option in every order", together=True)
def choice_consistency(answers: Sequence[Answer]) -> list[float | None]:
    """Of each question in each order: the share of its other orders in which the same option (by text) is chosen."""
    orders: dict[str, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        source = answer.fields.get("source_id")
        if source is not None:
            orders[str(source)].append(index)
    values: list[float | None] = [None] * len(answers)
    for indices in orders.values():
        chosen = [_chosen_text(answers[index]) for index in indices]
        for place, index in enumerate(indices):
            others = chosen[:place] + chosen[place + 1 :]
            if others:
                same = sum(text is not None and text == chosen[place] for text in others)
                values[index] = same / len(others)
    return values


def _chosen_text(answer: Answer) -> str | None:
    chosen = answer.once(_chosen)
    return None if chosen is None else _options(answer)[chosen].lower()
