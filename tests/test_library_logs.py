"""Starting is quiet: what libraries say at their import, and of their own old names, is no news to anybody."""

import os
import subprocess
import sys

import pytest

from tests.documented_commands import ROOT
from tests.tiny import make_llava
from tests.train.helpers import configs_alone

ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("model"))


def test_loading_and_asking_from_python_says_nothing(model):
    code = f"import llava; llava.load({str(model)!r}, device='cpu').answer('?', [], max_new_tokens=1)\n"
    code += "import bitsandbytes, torchao"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_what_else_they_say_is_said(model):
    code = "import logging, warnings, llava\nlogging.getLogger('torchao').error('broken')\nwarnings.warn('other words')"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert "broken" in done.stderr and "other words" in done.stderr


def test_a_dry_run_says_nothing_of_threads(tmp_path):
    words = ["estimate", *configs_alone(tmp_path), "--bf16", "True"]
    code = f"from llava.__main__ import main; main({words!r})"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert "fits" in done.stdout and "OMP_NUM_THREADS" not in done.stderr and "Warning" not in done.stderr
