"""A look at the steps of a tokenizer.json before the library takes them: together they could make a text grow without
end, and the library then ends the process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.records import read_json

MOST_STEPS = 32
"""Of a kind (normalizers, pre-tokenizers, post-processors, decoders)."""
MOST_REPLACEMENTS = 16
MOST_GROWTH = 16
"""Times that all steps of a kind together may make a text longer."""
MOST_ADDED = 64
"""Characters, or tokens, that a step may put in."""
_KINDS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def check_steps(path: Path) -> None:
    """Raises a LlavaError that names the file for more than the caps above."""
    content = read_json(path)
    for kind, parts in _KINDS.items():
        steps = list(_steps(content.get(kind), parts))
        replacements = sum(step.get("type") == "Replace" for step in steps)
        if len(steps) > MOST_STEPS or replacements > MOST_REPLACEMENTS:
            raise LlavaError(
                f"{path}: {kind} has {len(steps)} steps, {replacements} of them Replace; "
                f"at most {MOST_STEPS} and {MOST_REPLACEMENTS} are taken"
            )
        growth = 1.0
        for step in steps:
            growth *= _growth(step, path)
        if growth > MOST_GROWTH:
            raise LlavaError(f"{path}: {kind} makes a text {growth:.0f} times as long; at most {MOST_GROWTH} are taken")


def _steps(step: Any, parts: str) -> Iterator[dict[str, Any]]:
    """All steps in a sequence of sequences."""
    if not isinstance(step, dict):
        return
    if step.get("type") == "Sequence":
        for one in step.get(parts) or ():
            yield from _steps(one, parts)
    else:
        yield step


def _growth(step: dict[str, Any], path: Path) -> float:
    """How many times as long a step makes a text, at the most."""
    kind = step.get("type")
    if kind in ("ByteLevel", "Precompiled"):
        return 2.0  # a byte becomes a letter of one or two bytes; a library's own table
    if kind == "TemplateProcessing":
        return max(_growth_by(step, template, path) for template in ("single", "pair"))
    words = step.get("content" if kind == "Replace" else "prepend", "")
    if kind not in ("Replace", "Prepend") or not isinstance(words, str):
        return 1.0
    if len(words) > MOST_ADDED:
        raise LlavaError(f"{path}: {kind} puts in {len(words)} characters; at most {MOST_ADDED} are taken")
    if kind == "Prepend":
        return 1.0  # once for a text
    pattern = step.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else pattern
    # An expression may find single characters, and places between them.
    return max(1.0, len(words) / len(replaced)) if isinstance(replaced, str) and replaced else 1.0 + len(words)


def _growth_by(step: dict[str, Any], template: str, path: Path) -> float:
    """How many times as long a template makes a text: as often as the text stands in it."""
    parts, tokens = step.get(template) or (), step.get("special_tokens") or {}
    added = sum(
        len(tokens.get(part["SpecialToken"]["id"], {}).get("ids", ())) for part in parts if "SpecialToken" in part
    )
    if added > MOST_ADDED:
        raise LlavaError(f"{path}: TemplateProcessing puts in {added:,} tokens; at most {MOST_ADDED} are taken")
    return max(1.0, sum("Sequence" in part for part in parts))
