"""What training makes of a record: the template, and how many positions an image takes, as the model's folder says."""

from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.records import read_json
from llava.tokenization import ImageTokens


@dataclass(frozen=True)
class SampleForm:
    """The defaults are those of a folder that says nothing: a tokenizer alone."""

    template: str = "v0"
    image_tokens: ImageTokens = field(default_factory=ImageTokens)
    features_per_image: int = 256

    def __str__(self) -> str:
        around = ", <im_start> and <im_end> around it" if self.image_tokens.use_start_end else ""
        return f"template {self.template}, {self.features_per_image} positions an image{around}"


def add_form_flags(parser: ArgumentParser) -> None:
    """`--template` and `--features-per-image`."""
    parser.add_argument(
        "--template", "--version", help="the prompt template that training will use; default: the model's own, else v0"
    )
    parser.add_argument(
        "--features-per-image",
        type=int,
        help="positions of an image: 256 for ViT-L/14 at 224, 576 at 336; default: the model's own, else 256",
    )


def form_of(
    folder: Path,
    template: str | None = None,
    features_per_image: int | None = None,
    scheme: str | None = None,
    use_start_end: bool | None = None,
) -> SampleForm:
    """The form of samples that training from `folder` would make; what is given takes the place of the model's own.

    Raises:
        LlavaError: a template or scheme that doesn't exist, a number of positions that can't be, a configuration that
            can't be read.
    """
    from llava.conversation import get_template

    if features_per_image is not None and features_per_image < 1:
        raise LlavaError(f"--features-per-image {features_per_image}: give 1 or more")
    own = _own_form(folder)
    get_template(template or own.template)  # an unknown name is an error now, not once per record
    tokens = own.image_tokens
    return SampleForm(
        template or own.template,
        ImageTokens(scheme or tokens.scheme, tokens.use_start_end if use_start_end is None else use_start_end),
        features_per_image or own.features_per_image,
    )


def _own_form(folder: Path) -> SampleForm:
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else None
    if not isinstance(content, dict):
        return SampleForm()
    from llava.model.checkpoint.config import read_config, training_template
    from llava.model.checkpoint.hf_layout import is_hf_config, native_config
    from llava.model.families import find_family

    if is_hf_config(content):
        config = native_config(folder)
    elif find_family(content.get("model_type")) is None:
        return SampleForm()
    else:
        config = read_config(folder)
    template = training_template(config, folder)
    features = _features(config, folder)
    return SampleForm(template, ImageTokens.from_config(config), features or SampleForm.features_per_image)


def _features(config: Any, folder: Path) -> int | None:
    """Features of an image that is no tiles; None where the tower isn't here."""
    from llava.model.towers import read_vision_config, sketch_vision_tower
    from llava.model.towers.clip import known_vision_config

    name = config.mm_vision_tower
    vision = config.mm_vision_config or (known_vision_config(name) if name else None)
    here = next((place for place in (Path(name), folder / name) if place.is_dir()), None) if name else None
    if not vision and here is not None:
        vision = read_vision_config(here)
    if not vision:
        return None
    config.mm_vision_config = vision
    return sketch_vision_tower(config).num_patches
