"""What a phantom shows: the five domains, their findings, and how combinations are dealt to the splits.

An image has a domain and, unless it is normal, one kind of finding with a side, a place, a size and a number.
Every combination of the five is equally frequent; one in sixteen is kept for the test split.
"""

from dataclasses import dataclass

import numpy as np

SIDES = ("left", "right")
PLACES = ("upper", "lower")
SIZES = ("small", "large")
NUMBERS = ("one", "several")

SHAPES = ("disc", "ring", "star", "band")
"""How the kinds of a domain look, in the order of `Domain.kinds`."""


@dataclass(frozen=True)
class Domain:
    """One of LLaVA-Med's five domains."""

    key: str
    """Name in a record's `domain`."""
    modality: str
    organ: str
    kinds: tuple[str, str, str, str]
    """Findings, one of each shape."""


DOMAINS = (
    Domain(
        "chest_xray",
        "chest X-ray",
        "chest",
        ("nodule", "cavity", "mass", "atelectasis"),
    ),
    Domain(
        "ct_scan",
        "CT scan",
        "abdomen",
        ("cyst", "abscess", "metastasis", "laceration"),
    ),
    Domain(
        "mri",
        "MRI scan",
        "brain",
        ("meningioma", "glioma", "cavernoma", "infarct"),
    ),
    Domain(
        "histology",
        "histology slide",
        "colon",
        ("follicle", "gland", "carcinoma", "vessel"),
    ),
    Domain(
        "gross",
        "gross specimen",
        "liver",
        ("adenoma", "granuloma", "hemorrhage", "scar"),
    ),
)


@dataclass(frozen=True)
class Phantom:
    """The facts of one image; indices into `DOMAINS`, its `kinds`, `SIDES`, `PLACES`, `SIZES`, `NUMBERS`.

    `kind` is None in a normal image, whose other fields mean nothing then.
    """

    domain: int
    kind: int | None
    side: int = 0
    place: int = 0
    size: int = 0
    number: int = 0

    @property
    def is_normal(self) -> bool:
        return self.kind is None

    @property
    def finding(self) -> int:
        """The kind, of an image that isn't normal."""
        assert self.kind is not None, "a normal image has no finding"
        return self.kind


def all_combinations() -> list[Phantom]:
    """Every combination of domain, kind, side, place, size and number."""
    shape = (len(DOMAINS), len(SHAPES), len(SIDES), len(PLACES), len(SIZES), len(NUMBERS))
    return [Phantom(*map(int, index)) for index in np.ndindex(shape)]


def is_held_out(phantom: Phantom, seed: int) -> bool:
    """Whether only the test split may show this combination: one in sixteen, another choice for each seed.

    Each kind of each domain has one. They are spread so that in the test split every side, place, size and number
    is as frequent as its opposite. (Held out more densely, training learns from absence: it holds what it never
    saw for impossible, and the test measures that instead of what the image shows.)
    """
    if phantom.is_normal:
        return False
    low, high = phantom.finding & 1, phantom.finding >> 1
    turn = seed + phantom.domain
    return (phantom.side, phantom.place, phantom.size, phantom.number) == (
        low ^ (turn & 1),
        high ^ (turn >> 1 & 1),
        low ^ high ^ (turn >> 2 & 1),
        (low if phantom.domain & 1 else high) ^ (phantom.domain >> 1 & 1),
    )


def draw_facts(count: int, seed: int, *, held_out: bool, normal_share: float, stream: int) -> list[Phantom]:
    """`count` phantoms in random order: combinations as evenly frequent as the count allows.

    Args:
        seed: of the whole set; decides which combinations are held out.
        held_out: the combinations kept for the test split, or those that training shows.
        normal_share: share of images without a finding.
        stream: number of the split, so that splits draw different random numbers.
    """
    random = np.random.default_rng([seed, stream, 0])
    normals = round(count * normal_share)
    combinations = [phantom for phantom in all_combinations() if is_held_out(phantom, seed) == held_out]
    facts = [Phantom(index % len(DOMAINS), None) for index in range(normals)]
    while len(facts) < count:
        order = random.permutation(len(combinations))
        facts += [combinations[index] for index in order[: count - len(facts)]]
    return [facts[index] for index in random.permutation(count)]
