"""Where what is computed of a data file is kept, to be found again by the next run."""

import hashlib
import os
from pathlib import Path
from typing import Any


def kept_path(data_path: Path, output_dir: Path, name: str, settings: dict[str, Any]) -> Path:
    """A hidden file next to the data, or in `output_dir` if that can't be written.

    Its name ends with `name` and changes with the data's size and time and with whatever `settings` hold.
    """
    status = data_path.stat()
    text = repr((sorted(settings.items()), status.st_size, status.st_mtime_ns))
    folder = data_path.parent if os.access(data_path.parent, os.W_OK) else output_dir
    return folder / f".{data_path.name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.{name}"
