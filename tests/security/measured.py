"""`python -m tests.security.measured ours|described|placed|slides|plainly NAME…`: open images under limits.

One JSON line for each: {"name", "outcome", "text"}; a limit that is passed ends the process, or shows as a MemoryError.
What is allowed is what the project promises of `open_image`: 5 seconds of one core and 1.5 GB, whatever the file.
"""

import contextlib
import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

SECONDS = 5
MEMORY = 1_500_000_000


def main(how: str, names: list[str]) -> None:
    import nibabel  # noqa: F401
    import pydicom.pixels  # noqa: F401
    from PIL import Image

    from llava.images import describe_image, open_image
    from llava.images.series import series_place
    from tests.security.hidden_bombs import COUNTED, HIDDEN, SORTED
    from tests.security.image_bombs import AT_CAP, BOMBS, encoded, open_plainly
    from tests.security.slide_bombs import SLIDES

    with contextlib.suppress(ImportError):  # of an extra
        import openslide  # noqa: F401

    def open_slide(content: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=".svs") as file:
            file.write(content)
            file.flush()
            open_image(file.name)

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    Image.init()
    open_image(encoded("JPEG"))
    makers = BOMBS | AT_CAP | HIDDEN | COUNTED | SORTED | SLIDES
    read = {
        "ours": open_image,
        "described": describe_image,
        "placed": series_place,
        "slides": open_slide,
        "plainly": open_plainly,
    }[how]
    for name in names:
        content = makers[name]()
        _limit()
        try:
            read(content)
            outcome, text = "opened", ""
        except MemoryError:
            outcome, text = "MemoryError", ""
        except Exception as error:  # noqa: BLE001 - it is what is asked here
            outcome, text = type(error).__name__, str(error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(json.dumps({"name": name, "outcome": outcome, "text": text[:300]}), flush=True)


def _limit() -> None:
    """From here on; the processor's seconds end the process by a signal."""
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
    seconds = int(time.process_time()) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
