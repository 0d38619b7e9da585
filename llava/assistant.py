"""A model to ask, in a few lines: `llava.load(path).answer("Is there a nodule?", images=["scan.dcm"])`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, get_template
from llava.errors import LlavaError, amount
from llava.generation import Answer, Request, SamplingParams
from llava.image_options import ImageWithOptions, read_image_entry
from llava.images import open_image
from llava.images.modes import grey_to_rgb, scale_grey
from llava.model.weights.locate import locate_model

if TYPE_CHECKING:
    from llava.generation import Engine

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Mapping[str, Any] | ImageWithOptions
"""A path (PNG, JPEG, DICOM, NIfTI, …), a file's content, a data: URL, a Pillow image, or an array: grey
`[height, width]` of any number type, or uint8 `[height, width, 3]`; with options as in a record:
`{"path": "ct.nii.gz", "preset": "lung", "slice": 40}` (`bytes` in place of `path`), or an ImageWithOptions."""


def load(
    model_path: str | Path, model_base: str | Path | None = None, *, system: str | None = None, **options: Any
) -> "Assistant":
    """Load a checkpoint to ask.

    Args:
        model_path: as for `llava.load_pretrained_model`.
        model_base: likewise.
        options: its others (`device`, `dtype`, `load_4bit`, `conversation_template`, …).
        system: a system text in place of the template's.

    Raises:
        LlavaError: what is missing or unreadable, and where.
    """
    folder = locate_model(model_path, cache_dir=options.get("cache_dir"))  # before torch is imported, for seconds
    from llava.generation import Engine
    from llava.model import load_pretrained_model

    return Assistant(Engine(load_pretrained_model(folder, model_base, **options)), system)


class Assistant:
    """A loaded model. For research only: never use its answers for a clinical decision.

    Questions with like images share what was computed for them, whichever method asks. `sampling` are fields of
    `llava.generation.SamplingParams`: greedy by default.
    """

    def __init__(self, engine: "Engine", system: str | None = None):
        self.engine = engine
        self.system = system

    def answer(
        self, question: str | Conversation, images: Sequence[ImageSource] | ImageSource = (), **sampling: Any
    ) -> str:
        """The answer's text.

        Args:
            question: text, in which an `<image>` says where each image belongs (in front of it all, if it has none);
                or a whole conversation whose last turn is the question.

        Raises:
            LlavaError: an image that can't be read, a conversation longer than the context, a sampling parameter
                outside its range.
        """
        return self.answer_all([(question, images)], **sampling)[0].text

    def answer_all(
        self, questions: Sequence[tuple[str | Conversation, Sequence[ImageSource] | ImageSource]], **sampling: Any
    ) -> list[Answer]:
        """Answers to (question, images) pairs, computed together; `text`, `finish_reason`, token ids and, with
        `logprobs=N`, the log-probability of each token with N alternatives."""
        return self.engine.generate([self._request(question, images, sampling) for question, images in questions])

    def stream(
        self, question: str | Conversation, images: Sequence[ImageSource] | ImageSource = (), **sampling: Any
    ) -> Iterator[str]:
        """The answer's text in pieces, as they are made."""
        return self.engine.stream(self._request(question, images, sampling))

    def conversation(self) -> Conversation:
        """An empty conversation in the model's template, to append turns to."""
        conversation = get_template(self.engine.model.config.conversation_template)
        if self.system is not None:
            conversation.set_system(self.system)
        return conversation

    def _request(self, question: str | Conversation, images: Any, sampling: dict[str, Any]) -> Request:
        several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
        opened = [_open(image) for image in (images if several else [images])]
        if not isinstance(question, Conversation):
            text, question = question, self.conversation()
            question.append_message(question.roles[0], with_images(text, len(opened)))
        return Request(question, opened, SamplingParams(**sampling))


def with_images(question: str, count: int) -> str:
    """The question with an <image> for each image before it, where it names none itself.

    Raises:
        LlavaError: it names a number of images that isn't `count`.
    """
    named = question.count(DEFAULT_IMAGE_TOKEN)
    if named not in (0, count):
        raise LlavaError(
            f"the question has {named} {DEFAULT_IMAGE_TOKEN} for {amount(count, 'image')}; give each image one, or none"
        )
    return question if named else (DEFAULT_IMAGE_TOKEN + "\n") * count + question


def _open(image: ImageSource) -> Any:
    if isinstance(image, Mapping):
        image = read_image_entry(image)
        # A file without options stays an object, as records have it.
        image = image["bytes"] if isinstance(image, Mapping) and image.get("bytes") is not None else image
    if not isinstance(image, np.ndarray):
        return open_image(image)  # type: ignore[arg-type]
    if image.ndim == 2:
        return grey_to_rgb(scale_grey(image))
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
        return Image.fromarray(image)
    raise LlavaError(
        f"an array has to be grey [height, width] or uint8 [height, width, 3], not {image.dtype} {list(image.shape)}; "
        f"of a volume give a slice"
    )
