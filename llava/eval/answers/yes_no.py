"""How sure a model is of yes against no: the probabilities of the token that tells the two words apart."""

from collections.abc import Sequence
from typing import Any

import torch

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation, get_template
from llava.errors import LlavaError
from llava.eval.answers.likelihood import last_logits
from llava.generation import Engine
from llava.model.checkpoint.layouts import open_checkpoint
from llava.model.loader import add_missing_image_tokens
from llava.model.tokenizer import load_tokenizer_of
from llava.model.weights.locate import locate_model
from llava.tokenization import (
    ImageTokens,
    conversation_from_record,
    encode_conversation,
    encode_prompt,
    expand_images,
)

YES, NO = ("yes", "Yes"), ("no", "No")


@torch.inference_mode()
def yes_probabilities(
    engine: Engine,
    template: Conversation,
    asked: Sequence[tuple[list[dict[str, str]], Sequence[Any]]],
    batch_size: int = 32,
) -> list[float]:
    """P(yes) / (P(yes) + P(no)) of each question, over both ways of writing each word.

    Args:
        engine: its model, and the features of images that it keeps.
        asked: per question its turns (`{"from", "value"}`, the last one the question) and its images (whatever
            `open_image` takes).

    Raises:
        LlavaError: the tokenizer doesn't tell the words apart by a token.
    """
    if not asked:
        return []
    tokenizer, encoder = engine.tokenizer, engine.encoder
    image_tokens = ImageTokens.from_config(engine.model.config, tokenizer)
    opening, yes, no = _answer_tokens(template, tokenizer, image_tokens)
    chances = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        prompts, shown = [], []
        for turns, sources in batch:
            images = [encoder.identify(source) for source in sources]
            prompt = conversation_from_record(turns, template)
            unexpanded = encode_prompt(prompt, tokenizer, image_tokens) + opening
            ids, _ = expand_images(unexpanded, None, [encoder.num_positions(image) for image in images])
            prompts.append(ids)
            shown += images
        logits = last_logits(engine, prompts, shown, 1)[:, -1]
        logs = torch.log_softmax(logits, dim=-1)
        said_yes, said_no = (torch.logsumexp(logs[:, sorted(tokens)], dim=1) for tokens in (yes, no))
        chances += torch.sigmoid(said_yes - said_no).tolist()
    return chances


def _answer_tokens(template, tokenizer, image_tokens) -> tuple[list[int], set[int], set[int]]:
    """(ids that every answer word begins with, the next ids of yes, those of no).

    Many tokenizers have a token for each word, others begin all of them with a blank.
    """
    found: dict[tuple[int, ...], tuple[set[int], set[int]]] = {}
    for words in zip(YES, NO):
        said, other = (_target_ids(word, template, tokenizer, image_tokens) for word in words)
        length = next((place for place, pair in enumerate(zip(said, other)) if pair[0] != pair[1]), None)
        if length is not None:
            yes, no = found.setdefault(tuple(said[:length]), (set(), set()))
            yes.add(said[length])
            no.add(other[length])
    # Where upper case begins with other ids than lower case, the first in YES that differs counts alone.
    for opening, (yes, no) in found.items():
        if not yes & no:
            return list(opening), yes, no
    raise LlavaError(
        "--yes-no-probabilities: this tokenizer has no token that tells yes from no; leave the flag out for this model"
    )


def check_tokens(model_path: str, model_base: str | None, vision_tower: str | None, template: str | None) -> None:
    """Fail before a model is loaded if its tokenizer doesn't tell yes from no.

    Raises:
        LlavaError: as `yes_probabilities`.
    """
    folder = locate_model(model_path)
    base = None if model_base is None else locate_model(model_base, "base model", relative_to=folder)
    parts = open_checkpoint(folder, base, vision_tower)
    tokenizer = load_tokenizer_of(parts.folders, folder)
    add_missing_image_tokens(tokenizer, parts.config, folder)
    named = get_template(template or parts.config.conversation_template)
    _answer_tokens(named, tokenizer, ImageTokens.from_config(parts.config, tokenizer))


def _target_ids(word: str, template: Conversation, tokenizer: Any, image_tokens: ImageTokens) -> list[int]:
    """The ids that training would have the model say if `word` were the answer, end mark included."""
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": word}]
    labels = encode_conversation(turns, template, tokenizer, image_tokens).labels
    return [label for label in labels if label != IGNORE_INDEX]
