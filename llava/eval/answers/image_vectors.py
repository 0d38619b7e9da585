"""Images as vectors by a vision model, to be compared by their cosine."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoModel

from llava.bars import tqdm
from llava.errors import LlavaError, amount
from llava.eval.answers.ablation import image_source
from llava.folders import is_file, other_form_note
from llava.image_options import with_options_of
from llava.images import ImageProcessor, open_image
from llava.model.library_model import load_library_model
from llava.model.weights.locate import locate_model
from llava.model.weights.placement import usable_device
from llava.record_content import image_file

Key = TypeVar("Key", bound=Hashable)


def image_vectors(
    images: Mapping[Key, tuple[Any, Path]],
    vision_tower: str | Path,
    *,
    batch_size: int = 16,
    device: str | torch.device | None = None,
) -> dict[Key, np.ndarray]:
    """{key: float32 [width]}: what the model itself makes of a whole image (CLIP's and DINOv2's class token, …).

    Args:
        images: {key: (what a record holds of it, the folder that it lies in)}; whatever tells them apart is a key.
        vision_tower: folder or hub id of a vision model of the library.

    Raises:
        LlavaError: an image is missing or can't be read, or what lies there is no such model.
    """
    folder = locate_model(vision_tower, "vision tower")
    processor = ImageProcessor.find(folder)
    if processor is None:
        raise LlavaError(f"{folder}: has no preprocessor_config.json; copy it from the model's source")
    files = {name: image_source(image_file(image), place) for name, (image, place) in images.items()}
    missing = [source for source in files.values() if isinstance(source, Path) and not is_file(source)]
    if missing:
        which = f"{amount(len(missing), 'image is', 'images are')} missing, first {missing[0]}"
        raise LlavaError(f"{which}{other_form_note(missing)}; check --image-folder")
    sources = {name: with_options_of(image, files[name]) for name, (image, _) in images.items()}
    model = _vision_model(folder).to(usable_device(device))
    names = list(sources)
    vectors: dict[Key, np.ndarray] = {}
    starts = range(0, len(names), batch_size)
    for start in tqdm(starts, desc="image features", unit="batch", leave=False, disable=None):
        batch = names[start : start + batch_size]
        pixels = torch.from_numpy(np.asarray(processor([open_image(sources[name]) for name in batch])))
        with torch.inference_mode():
            found = getattr(model(pixels.to(model.device, model.dtype)), "pooler_output", None)
        if found is None:
            raise LlavaError(f"{folder}: {type(model).__name__} makes no vector of a whole image; CLIP and DINOv2 do")
        vectors.update(zip(batch, found.float().cpu().numpy(), strict=True))
    return vectors


def _vision_model(folder: Path) -> Any:
    model = load_library_model(AutoModel, folder, "vision model")
    return getattr(model, "vision_model", model)
