"""Answers out of the training questions alone, without a model: what memory gives, and a model has to add to.

A question is answered by the training questions that are most like it: each votes for its own answer with
exp(likeness). What likeness is, is the caller's: words and images (`text_and_image_likeness`), or pixels (the demo's).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava.bars import tqdm
from llava.data.conversion import clean_text, yes_no_type
from llava.data.vqa_items import VqaItem, plain_question, read_vqa_items, vqa_item
from llava.errors import LlavaError
from llava.eval.answers.answering import answer_record, question_settings
from llava.eval.answers.questions import Question
from llava.eval.metrics.words import WHOLE_WORD
from llava.manifests import sha256_of, write_manifest
from llava.record_content import image_key, question_answer_pairs, read_named, record_images
from llava.records import iter_records, write_records

_TIE = 1e-9


@dataclass(frozen=True)
class Known:
    """A question of training with its answer; `image` is the first image's name, None without."""

    question: str
    answer: str
    answer_type: str
    image: str | None


Likeness = Callable[[Sequence[Known], Sequence[VqaItem]], Iterable[np.ndarray]]
"""For each question asked, float [known]: how like it each known one is; -inf for one that has no vote."""


def read_known(path: str | Path) -> list[Known]:
    """Every question of a training file, all those of a record too; the answer's type as `vqa_item` finds it.

    Raises:
        LlavaError: a record isn't a question with an answer, or there is none.
    """
    known = []
    for number, record in enumerate(iter_records(path)):
        first = vqa_item(record, f"{path} record {number}")
        known.append(Known(first.question, first.answer, first.answer_type, first.image))
        if "question" in record and "answer" in record:
            continue
        _, dialogue = read_named(record, f"{path} record {number}")
        image = next(map(image_key, record_images(record)), None)
        for question, answer in question_answer_pairs(dialogue.turns)[1:]:
            answer = clean_text(answer)
            known.append(Known(plain_question(question), answer, yes_no_type(answer), image))
    if not known:
        raise LlavaError(f"{path}: no questions")
    return known


def write_memory_answers(
    train: str | Path,
    test: str | Path,
    answers: str | Path,
    likeness: Likeness,
    neighbours: int,
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> int:
    """Answer the questions of `test` by those of `train`, with a manifest; returns how many have no answer ("").

    Args:
        likeness: of questions; only the `neighbours` most like ones vote.
        name: what the manifest calls this memory.
        settings: what else decides the answers, for the manifest.
        overwrite: replace other answers that are there.
    """
    known, asked = read_known(train), read_vqa_items(test)
    texts = [one.answer for one in known]
    found: list[str] = []
    votes: dict[int, tuple[np.ndarray, str]] = {}
    for row in likeness(known, asked):
        if id(row) not in votes:
            if len(votes) >= 8:  # of rows that all differ few are worth keeping
                votes.clear()
            votes[id(row)] = row, vote(row, texts, neighbours)  # with its row: no other one gets its id
        found.append(votes[id(row)][1])
    write_records(
        answers,
        (
            answer_record(Question(item.id, item.question), text, name, {"memory": name})
            for item, text in zip(asked, found, strict=True)
        ),
        overwrite=overwrite,
    )
    questions = question_settings(test, [Question(item.id, item.question) for item in asked])
    source = {"train": str(train), "train_sha256": sha256_of(Path(train)), "neighbours": neighbours}
    write_manifest(answers, **questions, checkpoint=name, memory={**source, **(settings or {})})
    return found.count("")


def vote(likeness: np.ndarray, answers: Sequence[str], neighbours: int) -> str:
    """The answer with the greatest sum of exp(likeness) among the nearest (and those as near as the last), case apart;
    of equal sums, the first one's of the nearest, as training lists them.

    "" where none has a vote.
    """
    order = np.argsort(-likeness, kind="stable")
    last = likeness[order[min(neighbours, len(order)) - 1]]
    # Questions that stand in training many times are alike: which of them come first in the file decides nothing.
    order = order[np.isfinite(likeness[order]) & (likeness[order] >= last - _TIE)]
    if not len(order):
        return ""
    weights: dict[str, float] = defaultdict(float)
    for index in order:
        weights[answers[index].strip().lower()] += math.exp(likeness[index] - likeness[order[0]])
    best = max(weights, key=lambda key: weights[key])
    return next(answers[index] for index in order if answers[index].strip().lower() == best)


def commonest(known: Sequence[Known], asked: Sequence[VqaItem]) -> Iterator[np.ndarray]:
    """All training answers of the question's type are alike: the commonest wins."""
    kinds = np.array([one.answer_type for one in known])
    rows: dict[str, np.ndarray] = {}  # the same object for one type, so that the votes are counted once
    for item in asked:
        if item.answer_type not in rows:
            rows[item.answer_type] = np.where(kinds == item.answer_type, 0.0, -np.inf)
        yield rows[item.answer_type]


class ImageFeatures(NamedTuple):
    """{image name: float [width]} of the training questions' images and of those of the questions asked: one name may
    stand for two images, where the two lie in different folders."""

    known: dict[str, np.ndarray]
    asked: dict[str, np.ndarray]


def text_and_image_likeness(features: ImageFeatures | None, text_weight: float, image_weight: float) -> Likeness:
    """Words by TF-IDF and images by their features, cosines both; only questions of one answer type are alike.

    Args:
        features: None leaves images out.
    """

    def likeness(known: Sequence[Known], asked: Sequence[VqaItem]) -> Iterator[np.ndarray]:
        words = WordWeights([one.question for one in known])
        kinds = np.array([one.answer_type for one in known])
        images = None
        if features and features.known:
            of_known, of_asked = _centred(features)
            images = np.stack([of_known[one.image] for one in known])
        for item in tqdm(asked, desc="memory", unit="question", leave=False, disable=None):
            row = text_weight * words.cosines(item.question)
            if images is not None:
                row = row + image_weight * (images @ of_asked[item.image])
            yield np.where(kinds == item.answer_type, row, -np.inf)

    return likeness


def _centred(features: ImageFeatures) -> list[dict[str | None, np.ndarray]]:
    """Vectors of length 1 of the known and of the asked, the mean of training's images taken away: what all images
    share tells none apart.

    Questions without an image have zeros.
    """
    mean = np.mean([vector for _, vector in sorted(features.known.items())], axis=0)

    def centred(vector: np.ndarray) -> np.ndarray:
        return (vector - mean) / (float(np.linalg.norm(vector - mean)) or 1.0)

    nothing = {None: np.zeros_like(mean)}
    return [nothing | {name: centred(vector) for name, vector in part.items()} for part in features]


class WordWeights:
    """TF-IDF of texts: counts of words times 1 + ln((1 + texts) / (1 + texts with the word)), of length 1."""

    def __init__(self, texts: Sequence[str]):
        counts = [Counter(_words(text)) for text in texts]
        found = Counter(word for count in counts for word in count)
        self._idf = {word: 1 + math.log((1 + len(texts)) / (1 + number)) for word, number in found.items()}
        places: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row, count in enumerate(counts):
            for word, weight in self._weights(count).items():
                places[word].append((row, weight))
        # By word, as a text has few of them: rows and their weights.
        self._places = {word: tuple(map(np.array, zip(*pairs))) for word, pairs in places.items()}
        self._texts = len(texts)

    def cosines(self, text: str) -> np.ndarray:
        """float [texts]: the cosine of `text` with each."""
        total = np.zeros(self._texts)
        for word, weight in self._weights(Counter(_words(text))).items():
            rows, weights = self._places[word]
            total[rows] += weight * weights
        return total

    def _weights(self, count: Counter[str]) -> dict[str, float]:
        weights = {word: number * self._idf[word] for word, number in count.items() if word in self._idf}
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        return {word: weight / length for word, weight in weights.items()}


def _words(text: str) -> list[str]:
    return WHOLE_WORD.findall(text.lower())
