"""The package as a whole: it imports lightly, and its public names are all there."""

import subprocess
import sys

import llava


def test_import_is_lazy():
    script = "import sys, llava; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_resolve():
    for name in llava.__all__:
        assert getattr(llava, name) is not None


def test_unknown_name():
    try:
        llava.nothing  # noqa: B018
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError("llava.nothing exists")
