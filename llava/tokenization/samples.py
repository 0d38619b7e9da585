"""A conversation as a training sample, and as the prompt whose ids that sample begins with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, Segment, SeparatorStyle, get_template
from llava.errors import LlavaError, amount
from llava.record_content import ASSISTANT, Dialogue, RecordOrTurns, Turn, read_dialogue
from llava.tokenization.batches import expand_images, truncate
from llava.tokenization.encoder import encode_segments
from llava.tokenization.hash_format import encode_hash_sample
from llava.tokenization.image_tokens import ImageTokens


@dataclass(frozen=True)
class Encoded:
    """A training sample. Labels are ids where the model has something to learn, IGNORE_INDEX elsewhere."""

    input_ids: list[int]
    labels: list[int]
    num_images: int
    """Images in the whole conversation, whether or not the sample was cut."""
    truncated: int = 0
    """Positions cut off at `max_length`."""
    dropped_turns: int = 0
    """Answers left out because no question came before them."""

    @property
    def num_targets(self) -> int:
        """How many ids are learned; 0 is a sample to report. (The first id is never predicted.)"""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode_conversation(
    record: RecordOrTurns,
    template: Conversation | str,
    tokenizer: Any,
    image_tokens: ImageTokens | None = None,
    *,
    max_length: int | None = None,
    features_per_image: int | Sequence[int] | None = None,
) -> Encoded:
    """Ids and labels of a record: exactly the answers' text and end marks are targets (v0's `###`: hash_format).

    Args:
        record: a record with "conversations", or its list of turns. A system turn takes the place of the template's
            system text.
        template: from `get_template`, or its name.
        image_tokens: how images stand in the text; None is one placeholder without start and end.
        max_length: longest sample in positions; what is beyond is cut off and counted.
        features_per_image: positions of each image; None leaves one IMAGE_TOKEN_INDEX for each.

    Raises:
        LlavaError: no conversation, or turns that don't alternate (see `read_dialogue`).
    """
    dialogue = read_dialogue(record)
    template = _template_of(dialogue, template)
    image_tokens = image_tokens or ImageTokens()
    turns, dropped = dialogue.turns, 0
    features = 1 if features_per_image is None else features_per_image
    if template.sep_style is SeparatorStyle.SINGLE:
        input_ids, labels = encode_hash_sample(turns, template, tokenizer, image_tokens, features)
    else:
        turns, dropped = _from_first_question(turns)
        segments = _merge(_training_segments(turns, template))
        parts = encode_segments([segment.text for segment in segments], tokenizer, image_tokens)
        ids = np.array([token for part in parts for token in part], np.int64)
        is_answer = np.repeat([segment.is_answer for segment in segments], [len(part) for part in parts])
        targets = np.where(is_answer & (ids != IMAGE_TOKEN_INDEX), ids, IGNORE_INDEX)
        input_ids, labels = expand_images(ids, targets, features)
    num_images = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    input_ids, labels, cut = truncate(input_ids, labels, max_length)
    return Encoded(input_ids.tolist(), labels.tolist(), num_images, cut, dropped)


def render_prompt(conversation: Conversation) -> str:
    """The text that the model goes on from: all turns so far and the cue for the answer."""
    return "".join(segment.text for segment in _prompt_segments(conversation))


def encode_prompt(conversation: Conversation, tokenizer: Any, image_tokens: ImageTokens | None = None) -> list[int]:
    """The ids of `render_prompt`: the beginning of the training sample that the conversation becomes once answered.

    One IMAGE_TOKEN_INDEX per image. (`###` templates: the training format differs from the prompt's, as in
    the reference.)
    """
    texts = [segment.text for segment in _merge(_prompt_segments(conversation))]
    return [token for part in encode_segments(texts, tokenizer, image_tokens or ImageTokens()) for token in part]


def conversation_from_record(record: RecordOrTurns, template: Conversation | str) -> Conversation:
    """The template with the record's turns said; a last answer is left out, so that it can be asked for."""
    dialogue = read_dialogue(record)
    template = _template_of(dialogue, template).copy()
    turns, _ = _from_first_question(dialogue.turns)
    if turns and turns[-1].role == ASSISTANT:
        turns = turns[:-1]
    for turn in turns:
        template.append_message(template.roles[turn.role], turn.text)
    return template


def stop_token_ids(template: Conversation, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's EOS, and the template's end mark where it is one token."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    mark = tokenizer.convert_tokens_to_ids(template.stop_str)
    is_token = mark is not None and tokenizer.convert_ids_to_tokens(mark) == template.stop_str
    return [*ids, mark] if is_token and mark not in ids else ids


def _template_of(dialogue: Dialogue, template: Conversation | str) -> Conversation:
    """The template, with the conversation's own system text where it has one."""
    template = get_template(template) if isinstance(template, str) else template
    if dialogue.system is None:
        return template
    template = template.copy()
    template.set_system(dialogue.system)
    return template


def _from_first_question(turns: list[Turn]) -> tuple[list[Turn], int]:
    """Without an answer that comes before any question (as the reference), and how many those were."""
    dropped = int(turns[0].role == ASSISTANT)
    return turns[dropped:], dropped


def _training_segments(turns: list[Turn], template: Conversation) -> list[Segment]:
    if template.sep_style is SeparatorStyle.PLAIN:
        return _plain_segments(turns, template)
    messages = [[template.roles[turn.role], template.place_images(turn.text)] for turn in turns]
    return replace(template, messages=messages, offset=0).segments()


def _plain_segments(turns: list[Turn], template: Conversation) -> list[Segment]:
    """Stage 1: the image, then its caption; the question is left out (as the reference)."""
    images = turns[0].text.count(DEFAULT_IMAGE_TOKEN) if turns else 0
    if len(turns) != 2 or not images:
        raise LlavaError(
            f'the template "{template.name}" takes a question with <image> and one answer, its caption; '
            f"this conversation has {amount(len(turns), 'turn')} and {images} <image> in the first"
        )
    return [Segment(DEFAULT_IMAGE_TOKEN * images, False), Segment(turns[1].text + template.sep, True)]


def _prompt_segments(conversation: Conversation) -> list[Segment]:
    messages = [
        [role, conversation.place_images(text) if isinstance(text, str) else text]
        for role, text in conversation.messages
    ]
    images = sum(text.count(DEFAULT_IMAGE_TOKEN) for _, text in messages if isinstance(text, str))
    if conversation.sep_style is SeparatorStyle.PLAIN and images:
        return [Segment(DEFAULT_IMAGE_TOKEN * images, False)]  # all that such a model has ever seen
    if len(messages) % 2:
        messages.append([conversation.roles[1], None])
    return replace(conversation, messages=messages).segments()


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one kind joined: each border left is one between answer and rest."""
    return [
        Segment("".join(segment.text for segment in group), is_answer)
        for is_answer, group in groupby(segments, key=lambda segment: segment.is_answer)
    ]
