"""Counting what an instruct file holds: root verbs with their objects, domains, lengths, turns.

The verbs and objects come from TextBlob's tagger and chunker, so they are approximate (see llava.data.stats).
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError, require
from llava.record_content import USER, question_answer_pairs, read_turns, record_domains, record_images

AUXILIARIES = {"be", "do", "have", "can", "could", "will", "would", "may", "might", "should", "must"}


@dataclass
class InstructStats:
    """Counts over one file; lengths are in words."""

    records: int = 0
    text_only: int = 0
    verbs: dict[str, Counter] = field(default_factory=lambda: {"instructions": Counter(), "responses": Counter()})
    without_pair: Counter = field(default_factory=Counter)
    domains: Counter = field(default_factory=Counter)
    turns: list[int] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"instructions": [], "responses": []})

    def as_json(self) -> dict:
        """The counts, the most frequent pairs first."""
        return {
            "records": self.records,
            "text_only": self.text_only,
            "domains": dict(self.domains),
            "turns": dict(sorted(Counter(self.turns).items())),
            "mean_words": {name: sum(values) / max(1, len(values)) for name, values in self.lengths.items()},
            "texts_without_verb_and_object": dict(self.without_pair),
            "verb_object": {
                name: [[verb, noun, count] for (verb, noun), count in pairs.most_common(200)]
                for name, pairs in self.verbs.items()
            },
        }


def collect(path: str | Path, max_records: int | None = None) -> InstructStats:
    """Read the records and count; raises a LlavaError that names a record without a conversation."""
    from llava.bars import tqdm
    from llava.records import iter_records

    find_pair = verb_object_finder()
    stats = InstructStats()
    for index, record in enumerate(tqdm(iter_records(path), desc="reading", unit="record")):
        if max_records is not None and index >= max_records:
            break
        try:
            turns, images = read_turns(record), record_images(record)
        except LlavaError as error:
            raise LlavaError(f"{path} record {index} ({record.get('id')!r}): {error}") from error
        stats.records += 1
        stats.text_only += not images
        stats.domains.update(record_domains(record))
        stats.turns.append(len(question_answer_pairs(turns)))
        for turn in turns:
            side = "instructions" if turn.role == USER else "responses"
            text = turn.text.replace(DEFAULT_IMAGE_TOKEN, " ").strip()
            stats.lengths[side].append(len(text.split()))
            pair = find_pair(text)
            if pair:
                stats.verbs[side][pair] += 1
            else:
                stats.without_pair[side] += 1
    if not stats.records:
        raise LlavaError(f"{path}: holds no records")
    return stats


def verb_object_finder():
    """A function from a text to the (verb, object) of its first sentence that has both, or None."""
    parse = require("textblob.en", "stats").parse
    lemmatize = require("simplemma", "stats").lemmatize

    def find(text: str) -> tuple[str, str] | None:
        for sentence in parse(text).split():
            pair = _pair([(token[0].lower(), token[1], token[2]) for token in sentence], lemmatize)
            if pair:
                return pair
        return None

    return find


def _pair(tokens: list[tuple[str, str, str]], lemmatize) -> tuple[str, str] | None:
    """(verb, object) of one sentence of (word, part of speech, chunk) tokens."""
    verbs: list[tuple[int, str]] = []
    for position, (word, tag, _) in enumerate(tokens):
        # A participle counts only after an auxiliary: "left lung" and "computed tomography" hold no verb.
        if tag in ("VB", "VBP", "VBZ", "VBD") or (tag in ("VBN", "VBG") and verbs and verbs[-1][1] in AUXILIARIES):
            verbs.append((position, lemmatize(word, lang="en")))
    if not verbs:
        return None
    # "can you identify …": the first verb that isn't an auxiliary, or the auxiliary if it stands alone.
    position, verb = next((found for found in verbs if found[1] not in AUXILIARIES), verbs[0])
    noun = None
    for word, tag, chunk in tokens[position + 1 :]:
        in_noun_phrase = chunk.endswith("NP")
        if noun and (not in_noun_phrase or chunk == "B-NP"):
            break
        if in_noun_phrase and tag[:2] == "NN" and word.isalpha():
            noun = lemmatize(word, lang="en")
        elif not in_noun_phrase and tag in ("IN", "TO", ".", ":"):
            break
    return (verb, noun) if noun else None
