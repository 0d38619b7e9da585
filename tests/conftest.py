"""Where the tests find the golden vectors and the real data, which stay outside the repository; and a disk to fill."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported first


# By default hypothesis fails an example that takes longer than 200 ms: on a busy machine any may.
settings.register_profile("no time limit", deadline=None)
settings.load_profile("no time limit")


def pytest_configure(config):
    # Two workers on two cores: one thread each is faster than four threads that fight.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def golden_root() -> Path:
    """The folder of golden vectors; a function too, because cases are collected before fixtures exist."""
    return Path(os.environ.get("LLAVA_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))


def golden_cases(group: str, marker: str = "meta.json") -> list:
    """One pytest parameter per case folder (a folder that holds `marker`) below `group`.

    Without the golden folder the single parameter is a skip that says so; a folder without cases is an error.
    """
    root = golden_root()
    if not root.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no golden vectors at {root}"))]
    folder = root / group
    cases = sorted(path.parent for path in folder.rglob(marker))
    if not cases:
        raise FileNotFoundError(f"no golden case ({marker}) below {folder}")
    return [pytest.param(case, id=str(case.relative_to(root))) for case in cases]


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    root = golden_root()
    if not root.is_dir():
        pytest.skip(f"no golden vectors at {root}; set LLAVA_GOLDEN_DIR")
    return root


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data (VQA-RAD, SLAKE, ROCO, images) beside the repository."""
    root = Path(os.environ.get("LLAVA_SHARED_DIR", ROOT.parent / "shared"))
    if not root.is_dir():
        pytest.skip(f"no data at {root}; set LLAVA_SHARED_DIR")
    return root


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "avx512bf16"])
def processor(request):
    """A processor without and one with AVX512-BF16, as bitsandbytes sees it when 4-bit modules are made."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
        yield


@pytest.fixture
def disk(tmp_path):
    """mount(options) of a memory file system of 64 KiB in a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        done = subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system can't be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)
