"""What every benchmark shares: this checkout's code, where models and data are, and how results are shown.

Imported first, it puts the checkout on the path, also of processes that are started: `python benchmarks/NAME.py`
measures the code next to it.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

SHARED = Path(os.environ.get("LLAVA_SHARED_DIR", ROOT.parent / "shared"))
DEMO_MODEL = ROOT / "runs" / "demo" / "vqa"
"""What `make demo` has trained."""
QUESTIONS = SHARED / "vqa_rad" / "testset.json"
IMAGES = SHARED / "vqa_rad" / "images"


def add_json_flag(parser) -> None:
    parser.add_argument("--json", type=Path, help="write {name: number} here")


def show(title: str, numbers: Mapping[str, float], path: Path | None) -> None:
    """Print the machine and a table; with `path` write the numbers there too."""
    print(f"{title}\n{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    width = max(len(name) for name in numbers) + 2
    for name, value in numbers.items():
        print(f"{name:<{width}}{value:14,.3f}" if isinstance(value, float) else f"{name:<{width}}{value:14,}")
    if path is not None:
        path.write_text(json.dumps(dict(numbers), indent=2) + "\n")
