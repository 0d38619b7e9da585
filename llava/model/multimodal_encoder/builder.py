"""`build_vision_tower` with LLaVA's arguments, for tools that were written for LLaVA."""

from types import SimpleNamespace
from typing import Any

from llava.errors import LlavaError
from llava.images import ImageProcessor
from llava.model import towers
from llava.model.towers import VisionTower, read_vision_config
from llava.model.towers.base import TOWER_PREFIX
from llava.model.weights.locate import locate_model


def build_vision_tower(vision_tower_cfg: Any, delay_load: bool = False, **kwargs: Any) -> VisionTower:
    """The tower in the folder (or of the hub id) that a config's `mm_vision_tower` or `vision_tower` names, loaded.

    `mm_vision_select_layer` and `mm_vision_select_feature` are the config's, else -2 and `patch`. `delay_load` and
    further arguments are LLaVA's and decide nothing here.

    Raises:
        LlavaError: the config names none, or what lies there is no vision tower.
    """
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if not name:
        raise LlavaError("the config names no vision tower; set mm_vision_tower to a folder or a hub id")
    folder = locate_model(name, "vision tower")
    config = SimpleNamespace(
        mm_vision_config=read_vision_config(folder),
        mm_vision_select_layer=getattr(vision_tower_cfg, "mm_vision_select_layer", -2),
        mm_vision_select_feature=getattr(vision_tower_cfg, "mm_vision_select_feature", "patch"),
    )
    tower = towers.build_vision_tower(config)
    source = tower.source(folder)
    tower.load_state_dict({name.removeprefix(TOWER_PREFIX): source.read(name) for name in source.names})
    tower.image_processor = ImageProcessor.find(folder) or tower.image_processor
    return tower.eval().requires_grad_(False)
