"""Generated dialogues → clean turns. The rules are data, and each counts what it dropped or changed."""

import re
from collections import Counter
from dataclasses import dataclass

Turn = tuple[str, str]
"""(question, answer)"""


@dataclass(frozen=True)
class Rule:
    """What to do where `pattern` is found: drop the turn, or cut the match out of the text."""

    name: str
    action: str  # "drop" or "cut"
    pattern: re.Pattern
    question: bool = True
    answer: bool = True


def _rule(name: str, action: str, pattern: str, question: bool = True, answer: bool = True) -> Rule:
    return Rule(name, action, re.compile(pattern, re.IGNORECASE), question, answer)


_TEXT = (
    r"(?:figure\s+|image\s+|picture\s+)?"
    r"(?:captions?|context|legend|description|(?:provided|given)\s+(?:text|information))\b(?!\s+of\b)"
)
_SOURCE = rf"(?:the|this|its|a)?\s*(?:provided\s+|given\s+|accompanying\s+)?{_TEXT}(?:\s+(?:provided|given))?"
_AS_SAID = r"(?:based on|according to|as (?:mentioned|described|stated|indicated|noted|seen) (?:in|by)"
_IMAGE = r"(?:image|picture|figure)"

# In this order: turns in which the assistant can't see are beyond help, phrases that can be cut are cut, and what
# still mentions the text is left out.
RULES: tuple[Rule, ...] = (
    _rule(
        "cannot_see",
        "drop",
        r"\b(?:can\s?not|can't|unable to|not able to|don't|do not)\s+(?:\w+\s+)?"
        rf"(?:see|view|access|have access to|look at)\s+(?:the\s+|this\s+|any\s+|an\s+)?(?:actual\s+)?{_IMAGE}s?\b"
        rf"|\b(?:without|no)\s+(?:direct\s+)?access\s+to\s+the\s+{_IMAGE}"
        r"|\bas an? (?:ai|text-based|language) (?:language )?(?:model|assistant)\b",
        question=False,
    ),
    _rule("leading_phrase", "cut", rf"^{_AS_SAID}|from|given)\s+{_SOURCE}\s*,?\s*"),
    _rule("inner_phrase", "cut", rf"(?:,|(?<!\s))\s*\(?\b{_AS_SAID}|in)\s+{_SOURCE}\)?,?(?=[\s.;:?!]|$)"),
    _rule("mentions_text", "drop", r"\b(?:captions?|descriptions?|legends?|context)\b|\bin-?text mentions?\b"),
)


def split_turns(text: str, counts: Counter, cut_off: bool = False) -> list[Turn]:
    """(question, answer) pairs of a dialogue written as "User: …" / "Assistant: …" lines.

    A speaker who goes on in another paragraph is one turn; a question without answer, an answer without question, or
    the last answer of a text that was `cut_off` in it, is left out and counted.
    """
    parts = re.split(r"^[ \t]*\**(user|assistant|human)\**\s*:\**\s*", text, flags=re.IGNORECASE | re.MULTILINE)
    turns: list[Turn] = []
    question: str | None = None
    for speaker, words in zip(parts[1::2], parts[2::2], strict=True):
        words = re.sub(r"[ \t]+", " ", words).strip()
        if speaker.lower() != "assistant":
            if question is not None:
                counts["unpaired"] += 1
            question = words
        elif question is None:
            counts["unpaired"] += 1
        else:
            turns.append((question, words))
            question = None
    if question is not None:
        counts["unpaired"] += 1
    elif cut_off and turns:
        counts["cut_off"] += 1
        turns.pop()
    return turns


def clean_turns(turns: list[Turn], counts: Counter) -> list[Turn]:
    """The turns that the rules leave, with counts[rule name] raised for each turn that a rule dropped or changed."""
    return [cleaned for turn in turns if (cleaned := _clean(turn, counts)) is not None]


def _clean(turn: Turn, counts: Counter) -> Turn | None:
    texts = list(turn)
    for rule in RULES:
        for index, applies in enumerate((rule.question, rule.answer)):
            if not applies:
                continue
            if rule.action == "drop":
                if rule.pattern.search(texts[index]):
                    counts[rule.name] += 1
                    return None
            else:
                cut = rule.pattern.sub("", texts[index])
                if cut != texts[index]:
                    counts[rule.name] += 1
                    texts[index] = cut[:1].upper() + cut[1:]
    if not all(text.strip(" .?!") for text in texts):
        counts["empty"] += 1
        return None
    return texts[0].strip(), texts[1].strip()
