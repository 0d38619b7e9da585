"""Sizes of the demo: what is drawn, how big the models are, how long each stage trains."""

from dataclasses import dataclass

from llava.data.phantoms.build import Counts


@dataclass(frozen=True)
class Stage:
    """A run of the training command."""

    steps: int
    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class Settings:
    """All that decides the demo's result, apart from the seed."""

    counts: Counts
    alignment: int = 2_400
    """Captions that stage 1 uses."""
    image_size: int = 96
    patch_size: int = 16
    tower_layers: int = 3
    tower_steps: int = 1400
    language_layers: int = 3
    batch_tokens: int = 3600
    hidden_size: int = 128
    stage_1: Stage = Stage(72, 5e-3, 32)
    stage_2: Stage = Stage(48, 2e-3, 16)
    vqa: Stage = Stage(150, 2e-3, 16)
    evaluation_batch: int = 128
    template: str = "mistral_instruct"
    claims_scores: bool = True
    """Whether the models learn enough for their scores to say something."""


FULL = Settings(Counts(train=16_000, test=208, conversations=1_000, vqa=2_400, text=16_000))

SMALL = Settings(
    counts=Counts(train=440, test=60, conversations=120, vqa=240, text=400),
    alignment=200,
    image_size=48,
    tower_layers=2,
    tower_steps=6,
    language_layers=2,
    hidden_size=32,
    stage_1=Stage(3, 3e-3, 8),
    stage_2=Stage(3, 2e-3, 8),
    vqa=Stage(4, 2e-3, 8),
    claims_scores=False,
)
"""Everything once, on 500 images, learning next to nothing: does the installation work?"""
