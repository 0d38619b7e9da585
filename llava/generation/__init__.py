"""The engine that turns (conversation, pictures, sampling) into text: batched, streaming, with any loaded model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from llava.conversation import Conversation
from llava.errors import LlavaError
from llava.tokenization import ImageTokens, encode_prompt, expand_images, pad_batch, stop_token_ids


@dataclass(frozen=True)
class SamplingParams:
    """How to decode; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One thing to answer: a conversation whose last turn is the question, and its pictures in reading order."""

    conversation: Conversation
    images: Sequence[Image.Image] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: Any = None


@dataclass
class Answer:
    """`finish_reason` is "stop" (end mark or stop string) or "length"."""

    text: str
    token_ids: list[int]
    finish_reason: str
    id: Any = None


class Engine:
    """Answers requests with a model from `load_pretrained_model`."""

    def __init__(self, loaded, batch_size: int = 32):
        self.tokenizer, self.model, self.image_processor, self.context_len = loaded
        self.model.eval()
        self.batch_size = batch_size
        self.image_tokens = ImageTokens.from_config(self.model.config, self.tokenizer)

    def generate(self, requests: Sequence[Request], progress: str | None = None) -> list[Answer]:
        """Answers in the order of the requests; computed in batches of like length."""
        from tqdm import tqdm

        encoded = [self._encode(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: -len(encoded[index]))
        answers: list[Answer | None] = [None] * len(requests)
        with tqdm(total=len(requests), desc=progress, unit="answer", disable=progress is None) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for index, answer in zip(
                    batch, self._run([requests[i] for i in batch], [encoded[i] for i in batch]), strict=True
                ):
                    answers[index] = answer
                bar.update(len(batch))
        return answers

    def stream(self, request: Request) -> Iterator[str]:
        """The pieces of one answer as they are made."""
        shown = ""
        for tokens, _ in self._decode([request], [self._encode(request)]):
            text, _ = self._text(tokens[0], request)
            if not text.endswith("�") and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text

    def _encode(self, request: Request) -> list[int]:
        ids = encode_prompt(request.conversation, self.tokenizer, self.image_tokens)
        expanded, _ = expand_images(ids, None, [self.model.num_patches] * len(request.images))
        if len(expanded) >= self.context_len:
            raise LlavaError(
                f"the prompt takes {len(expanded)} positions and the model's context is {self.context_len}; "
                f"shorten the conversation or give fewer pictures"
            )
        return expanded.tolist()

    def _run(self, requests, encoded) -> list[Answer]:
        tokens, reasons = [[] for _ in requests], ["length"] * len(requests)
        for tokens, reasons in self._decode(requests, encoded):  # noqa: B007
            pass
        return [
            Answer(self._text(row, request)[0], row, reason, request.id)
            for row, reason, request in zip(tokens, reasons, requests, strict=True)
        ]

    @torch.inference_mode()
    def _decode(self, requests, encoded):
        """Yield (token ids per request, finish reasons) after each step."""
        device = self.model.get_input_embeddings().weight.device
        batch = pad_batch([(ids, ids) for ids in encoded], self.tokenizer.pad_token_id or 0, side="left")
        ids, mask = (torch.from_numpy(batch[name]).to(device) for name in ("input_ids", "attention_mask"))
        mask = mask.long()
        features = self._image_features(requests)
        stops = [{*stop_token_ids(request.conversation, self.tokenizer)} for request in requests]
        tokens = [[] for _ in requests]
        reasons: list[str | None] = [None] * len(requests)
        generators = [
            None if r.sampling.seed is None else torch.Generator().manual_seed(r.sampling.seed) for r in requests
        ]
        output = self.model(
            input_ids=ids, attention_mask=mask, image_features=features, use_cache=True, logits_to_keep=1
        )
        for _ in range(max(request.sampling.max_new_tokens for request in requests)):
            logits = output.logits[:, -1].float().cpu()
            chosen = [
                _choose(row, request.sampling, generator)
                for row, request, generator in zip(logits, requests, generators, strict=True)
            ]
            for row, (token, request) in enumerate(zip(chosen, requests, strict=True)):
                if reasons[row] is not None:
                    continue
                if token in stops[row]:
                    reasons[row] = "stop"
                    continue
                tokens[row].append(token)
                if self._text(tokens[row], request)[1]:
                    reasons[row] = "stop"
                elif len(tokens[row]) >= request.sampling.max_new_tokens:
                    reasons[row] = "length"
            yield tokens, [reason or "length" for reason in reasons]
            if all(reasons):
                return
            mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=1)
            output = self.model(
                input_ids=torch.tensor(chosen, device=device)[:, None],
                attention_mask=mask,
                past_key_values=output.past_key_values,
                use_cache=True,
            )

    def _image_features(self, requests) -> torch.Tensor | None:
        """Features of all pictures in reading order; each distinct picture object is encoded once."""
        pictures = [picture for request in requests for picture in request.images]
        if not pictures:
            return None
        distinct = {id(picture): picture for picture in pictures}
        places = {key: place for place, key in enumerate(distinct)}
        pixels = self.image_processor(list(distinct.values()), self.model.config.image_aspect_ratio)
        features = self.model.encode_images(torch.from_numpy(pixels))
        return features[[places[id(picture)] for picture in pictures]].flatten(0, 1)

    def _text(self, tokens: list[int], request: Request) -> tuple[str, bool]:
        """(text up to a stop string, whether one was found)."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        stops = [request.conversation.stop_str, *request.sampling.stop]
        ends = [position for stop in stops if stop and (position := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


def _choose(logits: torch.Tensor, sampling: SamplingParams, generator: torch.Generator | None) -> int:
    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    kept = probabilities.cumsum(-1) - probabilities < sampling.top_p
    return int(order[torch.multinomial(probabilities * kept, 1, generator=generator)])
