"""The images of a set of questions: checked before anything else, and taken away on demand.

An ablation asks the same questions with a grey image ("blank"), with noise, or with an image of somebody
else ("shuffle"). What a model keeps of its score then, it doesn't get from the image.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.errors import LlavaError, amount
from llava.eval.answers.questions import Question
from llava.folders import is_file, other_form_note
from llava.image_options import ImageOptions, options_of, with_options_of
from llava.images import with_default_options
from llava.record_content import image_bytes, image_file, image_key

_SIDE = 224
_GREY = 128


class QuestionImages:
    """Where each question's images come from.

    Args:
        folder: of the images that questions name.
        questions: all that will be asked, also those of other processes, so that "shuffle" is the same in each.
        ablation: "blank", "noise" or "shuffle"; "none" leaves images as they are.
        seed: of noise and shuffling.
        defaults: how DICOM and NIfTI files are shown of which the questions say nothing.

    Raises:
        LlavaError: images are missing (the number, the first question and path), or there are too few to shuffle.
    """

    def __init__(
        self,
        folder: str | Path | None,
        questions: Iterable[Question],
        ablation: str = "none",
        seed: int = 0,
        defaults: ImageOptions | None = None,
    ):
        self.ablation, self.seed = ablation, seed
        self.sources: dict[Any, Any] = {}
        missing, together = [], []
        for question in questions:
            keys = [image_key(image) for image in question.images]
            together.append(keys)
            for key, image in zip(keys, question.images, strict=True):
                if key not in self.sources:
                    source = image_source(image_file(image), folder)
                    self.sources[key] = with_options_of(image, source)
                    if isinstance(source, Path) and not is_file(source):
                        missing.append((question.id, source))
        if missing:
            which, path = missing[0]
            note = other_form_note([path for _, path in missing])
            raise LlavaError(
                f'{amount(len(missing), "image is", "images are")} missing, first that of question "{which}": '
                f"{path}{note}; check --image-folder"
            )
        if defaults:
            self.sources = dict(zip(self.sources, with_default_options(list(self.sources.values()), defaults)))
        self._replacements: dict[Any, Any] = {}
        if ablation == "shuffle":
            self._replacements = _derangement(together, seed)

    def of(self, question: Question) -> list[Any]:
        """What stands for the question's images: paths, bytes or PIL images; the same object for the same one."""
        return [self._image(image_key(image)) for image in question.images]

    def metadata(self, question: Question) -> dict[str, Any]:
        """What an answer's record says of how the question's images were shown: `image_options`, for each image its
        options or null; nothing where there are none."""
        given = [options_of(image) for image in self.of(question)]
        return {"image_options": given} if any(given) else {}

    def _image(self, key) -> Any:
        if self.ablation == "none":
            return self.sources[key]
        if self.ablation == "shuffle":
            return self.sources[self._replacements[key]]
        name = "blank" if self.ablation == "blank" else key
        if name not in self._replacements:
            self._replacements[name] = _blank() if self.ablation == "blank" else _noise(key, self.seed)
        return self._replacements[name]


def image_source(image: Any, folder: str | Path | None) -> Any:
    """What `open_image` takes for a record's image: a path, a data address, or bytes."""
    if not isinstance(image, str):
        return image_bytes(image)
    return image if image.startswith("data:") else Path(folder or "") / image


def _derangement(together: Sequence[Sequence[str]], seed: int) -> dict[str, str]:
    """Each image's replacement, never one that a question shows beside it: a random cycle through all, with two
    exchanged wherever it leads to such a one.

    Args:
        together: the images of each question.
    """
    own: dict[str, set[str]] = defaultdict(set)
    for keys in together:
        for key in keys:
            own[key].update(keys)
    if len(own) < 2:
        raise LlavaError(f"--ablate-image shuffle needs at least two different images; there are {len(own)}")
    order = sorted(own)
    random.Random(seed).shuffle(order)
    found = dict(zip(order, [*order[1:], order[0]]))
    for key in order:
        if found[key] in own[key]:
            other = next((o for o in order if found[o] not in own[key] and found[key] not in own[o]), None)
            if other is None:
                raise LlavaError(
                    f"--ablate-image shuffle needs an image of another question for each; of {len(own)} there is none "
                    f'for "{key}": give more questions, or --ablate-image noise'
                )
            found[key], found[other] = found[other], found[key]
    return found


def _blank() -> Image.Image:
    return Image.new("RGB", (_SIDE, _SIDE), (_GREY,) * 3)


def _noise(key, seed: int) -> Image.Image:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    return Image.fromarray(generator.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8))
