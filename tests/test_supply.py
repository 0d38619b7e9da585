"""What is installed: the lock has each pin with its hashes, and is enough for an empty environment."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
UNLOCKED = {"torch", "deepspeed"}  # the Makefile says why
EXTRAS_NOT_PINNED = {"flash-attn", "liger", "openclip", "peers"}


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements.lock").read_text()


def test_the_lock_has_every_pin(lock):
    pinned = pins((ROOT / "constraints.txt").read_text())
    assert pins(lock) == {name: pinned[name] for name in pinned.keys() - UNLOCKED}, "run make lock"


def test_the_lock_has_hashes_and_no_address(lock):
    assert "://" not in lock
    for entry in re.split(r"\n(?=\S)", lock.strip()):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}$", entry), entry


def test_every_requirement_is_locked(lock):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    words = [*project["dependencies"], *(word for name in extras.keys() - EXTRAS_NOT_PINNED for word in extras[name])]
    locked = pins((ROOT / "constraints.txt").read_text()) | pins(lock)
    for requirement in map(Requirement, words):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_install_uses_the_lock():
    recipe = subprocess.run(
        ["make", "-n", "-B", "install"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--require-hashes --no-deps -r requirements.lock" in recipe


@pytest.mark.long
def test_an_empty_environment_is_complete(tmp_path):
    subprocess.run(["make", "install", f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}"], cwd=ROOT, check=True)
    subprocess.run([tmp_path / "venv/bin/pip", "check"], check=True)
    subprocess.run([tmp_path / "venv/bin/python", "-m", "llava.serve", "--help"], check=True, cwd=tmp_path)


class TestAudit:
    """The script with a stand-in for pip-audit: what a database says can't be asked for here."""

    def run(self, tmp_path, printed: dict | None, error: str = ""):
        script = "import sys\n"
        script += f"print({json.dumps(printed)!r})\n" if printed else f"sys.exit({error!r})\n"
        (tmp_path / "pip_audit.py").write_text(script)
        return subprocess.run(
            [sys.executable, ROOT / "scripts/audit.py", "constraints.txt"],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    def test_a_hole(self, tmp_path):
        hole = {"id": "CVE-1", "fix_versions": ["2.0"]}
        done = self.run(tmp_path, {"dependencies": [{"name": "a", "version": "1.0", "vulns": [hole]}]})
        assert done.returncode == 1
        assert done.stdout.splitlines() == ["a 1.0: CVE-1, closed in 2.0", "audit: 1 packages, 1 known holes (osv)"]

    def test_no_hole(self, tmp_path):
        done = self.run(tmp_path, {"dependencies": [{"name": "a", "version": "1.0", "vulns": []}]})
        assert (done.returncode, done.stdout) == (0, "audit: 1 packages, 0 known holes (osv)\n")

    @pytest.mark.parametrize(
        ("printed", "error"),
        [
            (None, "requests.exceptions.ConnectionError: no"),
            ({"dependencies": [{"name": "a", "skip_reason": "?"}]}, ""),
        ],
        ids=["no connection", "a mirror without a database"],
    )
    def test_unreachable(self, tmp_path, printed, error):
        done = self.run(tmp_path, printed, error)
        said = "audit: neither osv nor pypi can be reached from here; nothing was audited\n"
        assert (done.returncode, done.stdout) == (0, said)

    def test_another_failure(self, tmp_path):
        done = self.run(tmp_path, None, "constraints.txt: no such file")
        assert done.returncode == 2 and "no such file" in done.stderr
