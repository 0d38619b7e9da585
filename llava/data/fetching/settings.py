"""How a download goes about it: the defaults of `llava.data.download_images`' flags."""

from dataclasses import dataclass, field
from pathlib import Path

from llava.data.fetching.articles import OA_SERVICE


@dataclass(frozen=True)
class Limits:
    """How hard to try, and what is too much."""

    timeout: float = 30.0
    """Seconds without a byte."""
    article_timeout: float = 900.0
    """Seconds for one archive."""
    retries: int = 4
    backoff: float = 1.0
    """Seconds before the second try; doubled each time."""
    requests_per_second: float = 3.0
    """0: as fast as it goes."""
    max_image_bytes: int = 64_000_000
    max_article_bytes: int = 4_096_000_000
    max_unpacked_bytes: int = 16_384_000_000


@dataclass
class Settings:
    """What is done at once, and where."""

    connections: int = 8
    limits: Limits = field(default_factory=Limits)
    oa_service: str | None = OA_SERVICE
    """Asked for a new address when an article's own is dead; None: don't."""
    keep_archives: Path | None = None
    """Where whole archives are kept, and looked for before asking the network."""
    min_free_bytes: int = 2_000_000_000
    give_up_after: int = 200
    """After this many failed connections in a row the network counts as down."""
