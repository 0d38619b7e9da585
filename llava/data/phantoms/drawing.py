"""Images of phantoms, drawn for a whole batch at once.

`draw(phantoms, size, random)` gives RGB bytes. Position, shape, contrast, brightness, noise and anatomy vary
from image to image, more than a finding changes an image, so comparing pixels doesn't tell the findings.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from llava.data.phantoms.findings import DOMAINS, NUMBERS, SHAPES, SIZES, Phantom

BATCH = 16
"""Images drawn at once: what fits the processor's cache."""

RADII = (0.115, 0.24)
"""Radius of a small and of a large finding, in half widths of the image."""

CENTERS = {
    "chest_xray": (0.42, 0.36),
    "ct_scan": (0.38, 0.32),
    "mri": (0.35, 0.38),
    "histology": (0.42, 0.42),
    "gross": (0.4, 0.36),
}
"""Where the middle of a quadrant is relative to the organ's middle (x, y), in half widths."""


def draw(phantoms: Sequence[Phantom], size: int, random: np.random.Generator) -> np.ndarray:
    """RGB images, uint8 `[n, size, size, 3]`, in the order of `phantoms`."""
    images = np.empty((len(phantoms), size, size, 3), np.uint8)
    for domain in range(len(DOMAINS)):
        members = [index for index, phantom in enumerate(phantoms) if phantom.domain == domain]
        for start in range(0, len(members), BATCH):
            chunk = members[start : start + BATCH]
            images[chunk] = _draw_domain(domain, [phantoms[index] for index in chunk], size, random)
    return images


def _draw_domain(domain: int, phantoms: list[Phantom], size: int, random: np.random.Generator) -> np.ndarray:
    scene = Scene(phantoms, size, random)
    image = PAINTERS[DOMAINS[domain].key](scene)
    return scene.develop(image)


class Scene:
    """Coordinates and findings of a batch of images of one domain.

    `x` and `y` are float32 `[n, size, size]` in organ coordinates: each image is shifted, turned and scaled a
    little. -1 to 1 is about the image's width; y grows downwards.
    """

    def __init__(self, phantoms: list[Phantom], size: int, random: np.random.Generator):
        self.phantoms = phantoms
        self.size = size
        self.random = random
        self.count = len(phantoms)
        axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        shift = self.vary(-0.07, 0.07), self.vary(-0.07, 0.07)
        angle, scale = self.vary(-0.09, 0.09), self.vary(0.93, 1.07)
        column, row = axis[None, None, :] - shift[0], axis[None, :, None] - shift[1]
        self.x = (np.cos(angle) * column + np.sin(angle) * row) / scale
        self.y = (np.cos(angle) * row - np.sin(angle) * column) / scale
        self.edge = 2.0 / size
        self.masks = self._findings()

    def vary(self, low: float, high: float) -> np.ndarray:
        """A random number per image, `[n, 1, 1]`."""
        return self.random.uniform(low, high, (self.count, 1, 1)).astype(np.float32)

    def field(self, cells: int) -> np.ndarray:
        """Smooth random field, unit variance or so: `[n, size, size]` from a grid of `cells` a side."""
        grid = self.random.standard_normal((self.count, cells, cells), np.float32)
        weights = _interpolation(self.size, cells)
        return weights @ grid @ weights.T

    def ellipse(self, x: float | np.ndarray, y: float | np.ndarray, width, height, softness: float = 1.5) -> np.ndarray:
        """1 inside, 0 outside, soft at the edge."""
        distance = np.sqrt(((self.x - x) / width) ** 2 + ((self.y - y) / height) ** 2)
        return self.inside((distance - 1) * np.minimum(width, height), softness)

    def inside(self, distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
        """1 where the signed distance is negative, with an edge of `softness` pixels."""
        return np.clip(0.5 - distance / (self.edge * softness), 0, 1)

    def develop(self, image: np.ndarray) -> np.ndarray:
        """Exposure, uneven light, noise; `[n, size, size]` or `[n, size, size, 3]` in 0..1 to RGB bytes."""
        light = self.vary(0.82, 1.1) + 0.06 * self.field(3)
        offset = self.vary(-0.05, 0.09)
        noise = self.random.standard_normal(image.shape, np.float32)
        strength = self.vary(0.01, 0.035)
        if image.ndim == 4:
            light, offset, strength = light[..., None], offset[..., None], strength[..., None]
        image = image * light + offset + noise * strength
        pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
        return pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, axis=-1)

    def _findings(self) -> dict[str, np.ndarray]:
        """For each shape a mask in 0..1 and what else a painter needs, `[n, size, size]`."""
        masks = {name: np.zeros(self.x.shape, np.float32) for name in (*SHAPES, "core")}
        for index, phantom in enumerate(self.phantoms):
            if not phantom.is_normal:
                shape = SHAPES[phantom.finding]
                angle = self.random.uniform(0, 2 * np.pi)
                for x, y, radius in self._places(phantom):
                    self._stamp(index, shape, x, y, radius, angle + self.random.uniform(-0.3, 0.3), masks)
        return masks

    def _places(self, phantom: Phantom) -> list[tuple[float, float, float]]:
        """(x, y, radius) of each copy of an image's finding."""
        random = self.random
        radius = RADII[phantom.size] * random.uniform(0.9, 1.1)
        center = CENTERS[DOMAINS[phantom.domain].key]
        x = center[0] * (1 if phantom.side else -1) + random.uniform(-0.05, 0.05)
        y = center[1] * (1 if phantom.place else -1) + random.uniform(-0.06, 0.06)
        if NUMBERS[phantom.number] == "one":
            # A single finding has the whole quadrant to itself.
            spread = 0.1 if SIZES[phantom.size] == "small" else 0.05
            return [(x + random.uniform(-spread, spread), y + random.uniform(-spread, spread), radius)]
        copies = 3
        spread = max(0.26, 1.2 * radius)
        start = random.uniform(0, 2 * np.pi)
        angles = start + np.arange(copies) * (2 * np.pi / copies) + random.uniform(-0.2, 0.2, copies)
        return [(x + spread * np.cos(a), y + spread * np.sin(a), radius * random.uniform(0.92, 1.08)) for a in angles]

    def _stamp(
        self, index: int, shape: str, x: float, y: float, radius: float, angle: float, masks: dict[str, np.ndarray]
    ) -> None:
        """Draw one copy into the masks, in the window around it only."""
        reach = 1.7 * radius + 3 * self.edge
        rows, columns = self._window(index, x, y, reach)
        dx, dy = self.x[index, rows, columns] - x, self.y[index, rows, columns] - y
        distance = np.hypot(dx, dy)
        if shape == "disc":
            stretch = self.random.uniform(0.9, 1.1)
            mask = self.inside(np.hypot(dx * stretch, dy / stretch) - radius)
        elif shape == "ring":
            mask = self.inside(np.abs(distance - 0.85 * radius) - 0.23 * radius)
            core = masks["core"][index, rows, columns]
            np.maximum(core, self.inside(distance - 0.62 * radius), out=core)
        elif shape == "star":
            rays = np.cos(5 * (np.arctan2(dy, dx) + angle))
            mask = self.inside(distance - radius * (0.75 + 0.65 * rays))
        else:
            along = dx * np.cos(angle) + dy * np.sin(angle)
            across = dy * np.cos(angle) - dx * np.sin(angle)
            half = np.maximum(np.abs(along) - 1.15 * radius, 0)
            mask = self.inside(np.hypot(half, across) - 0.3 * radius)
        target = masks[shape][index, rows, columns]
        np.maximum(target, mask, out=target)

    def _window(self, index: int, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """Rows and columns of the image within `reach` of an organ coordinate."""
        near = (np.abs(self.x[index] - x) < reach) & (np.abs(self.y[index] - y) < reach)
        rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
        return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _paint_chest_xray(scene: Scene) -> np.ndarray:
    x, y = scene.x, scene.y
    aspect = np.abs(x)
    body = scene.inside(np.hypot(x / 0.98, np.maximum(-y - 0.35, 0) / 0.62) - 1, 12)
    image = 0.62 * body
    lung = np.maximum(
        scene.ellipse(-0.42, 0.0, scene.vary(0.34, 0.38), scene.vary(0.72, 0.8), 6),
        scene.ellipse(0.42, 0.0, scene.vary(0.34, 0.38), scene.vary(0.72, 0.8), 6),
    )
    diaphragm = scene.inside(0.62 - y - 0.25 * aspect, 6)
    lung = lung * (1 - diaphragm)
    image = image - lung * scene.vary(0.4, 0.47)
    image += lung * 0.035 * scene.field(18)
    ribs = np.cos((y + 0.35 * (aspect - 0.35) ** 2 - 0.25 * aspect) * scene.vary(21, 25) + scene.vary(0, 6.3))
    image += np.clip(ribs - 0.35, 0, 1) * 0.1 * body
    image += scene.inside(np.abs(x) - 0.085, 6) * 0.14
    image += scene.ellipse(0.12, 0.36, scene.vary(0.2, 0.26), 0.3, 8) * 0.12
    clavicle = scene.inside(np.abs(y + 0.7 - 0.18 * aspect) - 0.03, 2)
    image += clavicle * 0.12 * body
    return _show(image, scene)


def _paint_ct(scene: Scene) -> np.ndarray:
    x, y = scene.x, scene.y
    width, height = scene.vary(0.9, 0.96), scene.vary(0.78, 0.86)
    skin = scene.ellipse(0, 0, width, height)
    wall = scene.ellipse(0, 0, width * 0.92, height * 0.9)
    image = 0.22 * skin + wall * scene.vary(0.24, 0.3)
    image += wall * 0.03 * scene.field(9) + wall * 0.03 * scene.field(24)
    image += scene.ellipse(0, 0.62, 0.12, 0.11) * 0.45
    image += scene.ellipse(0, 0.42, 0.055, 0.055) * 0.12
    ribs = np.cos(np.arctan2(y, x) * 14 + scene.vary(0, 6.3))
    shell = wall - scene.ellipse(0, 0, width * 0.86, height * 0.83)
    image += shell * np.clip(ribs, 0, 1) * 0.4
    bowel = np.clip(scene.field(12) - 1.2, 0, 0.6) * scene.ellipse(0, 0, 0.12, 0.3, 10)
    image -= 0.3 * bowel
    return _show(image, scene)


def _paint_mri(scene: Scene) -> np.ndarray:
    width, height = scene.vary(0.76, 0.84), scene.vary(0.88, 0.95)
    head = scene.ellipse(0, 0, width, height)
    skull = scene.ellipse(0, 0, width * 0.93, height * 0.94)
    brain = scene.ellipse(0, 0, width * 0.87, height * 0.89)
    image = 0.65 * (head - skull) + 0.08 * (skull - brain)
    folds = np.exp(-((scene.field(14) / 0.16) ** 2))
    rim = brain - scene.ellipse(0, 0, width * 0.62, height * 0.66, 12)
    image += brain * scene.vary(0.34, 0.4) - 0.2 * folds * np.clip(rim, 0, 1)
    image += brain * 0.03 * scene.field(10)
    image -= brain * scene.inside(np.abs(scene.x) - 0.012, 2) * 0.2
    gap, long = scene.vary(0.08, 0.11), scene.vary(0.2, 0.28)
    ventricles = scene.ellipse(-gap, -0.02, 0.05, long) + scene.ellipse(gap, -0.02, 0.05, long)
    image -= 0.24 * np.clip(ventricles, 0, 1)
    return _show(image, scene)


def _paint_histology(scene: Scene) -> np.ndarray:
    masks = scene.masks
    fibres = scene.field(11)
    image = _color(0.93, 0.72, 0.82) + np.array([0.03, 0.07, 0.05], np.float32) * fibres[..., None]
    gaps = np.clip(scene.field(16) - 1.5, 0, 1)[..., None]
    image = _mix(image, gaps, (0.97, 0.95, 0.96))
    image = _mix(image, masks["core"][..., None], (0.98, 0.96, 0.98))
    density = 1.35 - 1.5 * masks["disc"] - 1.4 * masks["ring"] + 2 * masks["core"]
    density += 2 * masks["band"] - 0.9 * masks["star"]
    nuclei = np.clip((scene.field(scene.size // 4) - density) * 2.2, 0, 1) * 0.85
    tint = np.clip(0.8 * masks["disc"] + 0.85 * masks["ring"], 0, 1)
    image = _mix(image, tint[..., None], (0.48, 0.36, 0.68))
    image = _mix(image, 0.9 * masks["star"][..., None], (0.42, 0.1, 0.4))
    image = _mix(image, nuclei[..., None], (0.33, 0.2, 0.52))
    return _mix(image, 0.92 * masks["band"][..., None], (0.82, 0.16, 0.22))


def _paint_gross(scene: Scene) -> np.ndarray:
    masks = scene.masks
    angle = np.arctan2(scene.y, scene.x)
    wobble = 0.05 * np.cos(2 * angle + scene.vary(0, 6.3)) + 0.03 * np.cos(3 * angle + scene.vary(0, 6.3))
    organ = scene.inside(np.hypot(scene.x / 0.9, scene.y / 0.84) - 0.98 - wobble, 2)
    board = _color(0.36, 0.5, 0.56) + 0.03 * scene.field(5)[..., None]
    flesh = _color(0.5, 0.22, 0.17) + np.array([0.05, 0.035, 0.03], np.float32) * scene.field(20)[..., None]
    flesh = flesh + np.array([0.06, 0.04, 0.03], np.float32) * scene.field(5)[..., None]
    image = board + (flesh - board) * organ[..., None]
    shine = np.clip(scene.field(7) - 1.6, 0, 0.5) * organ
    image = image + 0.25 * shine[..., None]
    image = _mix(image, 0.9 * masks["disc"][..., None], (0.85, 0.68, 0.32))
    image = _mix(image, 0.9 * masks["ring"][..., None], (0.9, 0.85, 0.75))
    image = _mix(image, 0.8 * masks["core"][..., None], (0.6, 0.45, 0.3))
    image = _mix(image, 0.95 * masks["star"][..., None], (0.9, 0.72, 0.66))
    return _mix(image, 0.92 * masks["band"][..., None], (0.88, 0.8, 0.76))


PAINTERS: dict[str, Callable[[Scene], np.ndarray]] = {
    "chest_xray": _paint_chest_xray,
    "ct_scan": _paint_ct,
    "mri": _paint_mri,
    "histology": _paint_histology,
    "gross": _paint_gross,
}


def _show(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Findings of a grey image: each shape has its own density."""
    opacity = scene.vary(0.8, 0.95)
    for shape, level in (("disc", 0.75), ("core", 0.0), ("ring", 0.85), ("star", 0.95), ("band", 1.0)):
        image = image + (level - image) * (opacity * scene.masks[shape])
    return image


def _color(red: float, green: float, blue: float) -> np.ndarray:
    return np.array([red, green, blue], np.float32)


def _mix(image: np.ndarray, share: np.ndarray, color: tuple[float, float, float]) -> np.ndarray:
    """`image` `[n, h, w, 3]` with `share` `[n, h, w, 1]` of it replaced by a color."""
    return image + (_color(*color) - image) * share


@lru_cache(maxsize=32)
def _interpolation(size: int, cells: int) -> np.ndarray:
    """Weights `[size, cells]` that stretch a grid of values smoothly over `size` pixels."""
    position = np.linspace(0, cells - 1, size)[:, None] - np.arange(cells)[None]
    weights = np.exp(-(position**2) / 0.72)
    return (weights / np.sqrt((weights**2).sum(1, keepdims=True))).astype(np.float32)
