"""A conversation and how it becomes text.

`Conversation.segments` is the one place where a conversation is put into words: the prompt for inference is
its segments joined, the labels for training follow which of them are answers (llava.tokenization).
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN


class SeparatorStyle(StrEnum):
    """How turns are kept apart (names are the reference's)."""

    SINGLE = "SINGLE"
    """`system###Human: question###Assistant: answer###`"""
    TWO = "TWO"
    """`system USER: question ASSISTANT: answer</s>`"""
    LLAMA_2 = "LLAMA_2"
    """`[INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\nquestion [/INST] answer </s>`"""
    MPT = "MPT"
    """`system<|im_end|><|im_start|>user\\nquestion<|im_end|><|im_start|>assistant\\nanswer<|im_end|>`

    Where `sep` goes on after the end mark (a line break, in Qwen2's ChatML), `sep2` is the end mark alone. An empty
    system text has no turn."""
    PLAIN = "PLAIN"
    """`<image>caption\\n`, for stage 1"""


class Segment(NamedTuple):
    """A stretch of a rendered conversation; an answer's segment holds its text and its end mark."""

    text: str
    is_answer: bool


@dataclass
class Conversation:
    """A template and the turns said so far.

    A message is `[role, text]`; text None (or "") renders as the cue alone, which is where the model goes on.
    `(text, image, ...)` in place of a text marks an image given with it, as the reference's web demo does:
    templates with `image_first` then put `<image>` in front of the first question.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    """How many of `messages` are the template's own examples; a user's turns come after them."""
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    name: str = ""
    release: str = ""
    image_first: bool = True
    """A turn's single `<image>` moves to a line of its own in front of the text (all but LLaVA-Med v1.0)."""
    strip_turns: bool = False
    """Turns lose outer blanks and a blank follows each end mark (LLaVA-Med v1.5's TWO style)."""

    def copy(self) -> "Conversation":
        return replace(self, messages=deepcopy(self.messages))

    def set_system(self, text: str) -> None:
        """Put a conversation's own system text in the place of the template's; `plain` has no place for one."""
        self.system = "" if self.sep_style is SeparatorStyle.PLAIN else self.system_mark + text

    @property
    def system_mark(self) -> str:
        """What opens the system's turn in the MPT style: the user's mark with the other name. "" in other styles."""
        return self.roles[0].replace("user", "system") if self.sep_style is SeparatorStyle.MPT else ""

    def append_message(self, role: str, text: Any = None) -> None:
        self.messages.append([role, text])

    def get_prompt(self) -> str:
        """The whole conversation as text, exactly as the template's release renders it."""
        return "".join(segment.text for segment in self.segments())

    def segments(self) -> list[Segment]:
        """The rendered text in order, answers (second role, not empty) apart from the rest."""
        return [segment for segment in _RENDERERS[self.sep_style](self, self._texts()) if segment.text]

    def place_images(self, text: str) -> str:
        """A turn's text with its `<image>` where the template wants it, in training and in prompts alike.

        A single `<image>` goes in front, on a line of its own; several stay where they are, for there their places
        say which is meant. v1.0's templates leave all in place.
        """
        wrapped = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"
        if DEFAULT_IMAGE_TOKEN not in text or (self.wraps_images and wrapped in text):
            return text
        if self.image_first and text.count(DEFAULT_IMAGE_TOKEN) == 1:
            text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
        return text.replace(DEFAULT_IMAGE_TOKEN, wrapped) if self.wraps_images else text

    @property
    def stop_str(self) -> str:
        """The text that ends an answer; generation stops at it."""
        return self.sep if self.sep2 is None else self.sep2

    @property
    def wraps_images(self) -> bool:
        """Whether images stand between `<Image>` and `</Image>`."""
        return "mmtag" in self.version

    def _texts(self) -> list[tuple[str, str]]:
        """(role, text) of all messages, an image given with the first of them put in its place."""
        texts = [(role, _plain(text)) for role, text in self.messages]
        if not (self.image_first and self.messages and isinstance(self.messages[0][1], tuple)):
            return texts
        role, text = texts[0]
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if not self.wraps_images:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *texts[1:]]
        image = (self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
        return [image, (self.roles[1], "Received."), (role, text), *texts[1:]]


def _plain(text: Any) -> str:
    if isinstance(text, tuple):
        text = text[0]
    return "" if text is None else str(text)


def _single(conversation: Conversation, texts: list[tuple[str, str]]) -> Iterator[Segment]:
    yield Segment(conversation.system + conversation.sep, False)
    for role, text in texts:
        yield Segment(f"{role}:", False)
        if text:
            yield Segment(f" {text}{conversation.sep}", role == conversation.roles[1])


def _two(conversation: Conversation, texts: list[tuple[str, str]]) -> Iterator[Segment]:
    sep, end = conversation.sep, conversation.sep2 or ""
    yield Segment(conversation.system, False)
    pending = sep  # stands between what was rendered and what comes, if anything comes
    for index, (role, text) in enumerate(texts):
        yield Segment(f"{pending}{role}:", False)
        pending = ""
        if not text:
            continue
        if conversation.strip_turns:
            text = text.strip()
        if index % 2:
            yield Segment(f" {text}{end}", True)
            pending = sep if conversation.strip_turns else ""
        else:
            yield Segment(f" {text}", False)
            pending = sep
    if not conversation.strip_turns:
        yield Segment(pending, False)


def _llama_2(conversation: Conversation, texts: list[tuple[str, str]]) -> Iterator[Segment]:
    for index, (_, text) in enumerate(texts):
        if index == 0:
            if conversation.system:
                text = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n{text}"
            # Without the leading separator: the tokenizer adds the first <s> itself.
            yield Segment(f"[INST] {text} [/INST]", False)
        elif text and index % 2:
            yield Segment(f" {text} {conversation.sep2}", True)
        elif text:
            yield Segment(f"{conversation.sep}[INST] {text} [/INST]", False)


def _mpt(conversation: Conversation, texts: list[tuple[str, str]]) -> Iterator[Segment]:
    end = conversation.stop_str
    after = conversation.sep.removeprefix(end)
    spoken = bool(conversation.system)
    yield Segment(conversation.system + end if spoken else "", False)
    for role, text in texts:
        yield Segment((after if spoken else "") + role, False)
        spoken = bool(text)
        if text:
            yield Segment(text + end, role == conversation.roles[1])


def _plain_style(conversation: Conversation, texts: list[tuple[str, str]]) -> Iterator[Segment]:
    yield Segment(conversation.system, False)
    for index, (_, text) in enumerate(texts):
        if text:
            yield Segment(text + conversation.sep, index % 2 == 1)


_RENDERERS = {
    SeparatorStyle.SINGLE: _single,
    SeparatorStyle.TWO: _two,
    SeparatorStyle.LLAMA_2: _llama_2,
    SeparatorStyle.MPT: _mpt,
    SeparatorStyle.PLAIN: _plain_style,
}
