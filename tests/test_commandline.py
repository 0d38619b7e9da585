"""Flags, booleans, one-line errors and exit codes, as every command has them."""

import os
import subprocess
import sys

import pytest

from llava.commandline import ArgumentParser, existing_file, parse_bool, write_line
from llava.errors import LlavaError, amount, first_line

COMMAND = """
from llava.commandline import ArgumentParser, run
from llava.errors import LlavaError
def main():
    args = ArgumentParser().parse_args()
    raise LlavaError("record 17: image not found\\nrun something")
run(main)
"""


def parser():
    result = ArgumentParser()
    result.add_argument("--model-path")
    result.add_argument("--top_p", type=float)
    result.add_bool("--lazy_preprocess")
    return result


def test_dashes_and_underscores_are_the_same():
    args = parser().parse_args(["--model_path=x_y", "--top-p", "0.5", "--lazy-preprocess"])
    assert (args.model_path, args.top_p, args.lazy_preprocess) == ("x_y", 0.5, True)


@pytest.mark.parametrize(("words", "value"), [(["--lazy_preprocess", "False"], False), ([], False)])
def test_booleans_take_a_value_or_stand_alone(words, value):
    assert parser().parse_args(words).lazy_preprocess is value


def test_the_home_folder_is_known_after_an_equals_sign(monkeypatch):
    """A folder called ~ was made where the command ran."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = ArgumentParser()
    parser.add_argument("--image-folder")
    for given, taken in (("~/a~/b", "/home/me/a~/b"), ("a/~/b", "a/~/b"), ("~3", "~3")):
        assert parser.parse_args([f"--image_folder={given}"]).image_folder == taken


def test_what_is_no_file_is_said(tmp_path):
    """A pipe of the shell, <(zcat a.json.gz), was not found."""
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "is a device or a pipe"), (".", "is a folder"), ("none", "not found")):
        with pytest.raises(LlavaError, match=f"record file {words}"):
            existing_file(tmp_path / name, "record file")


def test_no_abbreviations(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--model", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --model x; see --help\n"


def test_bad_boolean():
    with pytest.raises(Exception, match="maybe"):
        parse_bool("maybe")


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n a\nb"), "a"), (EOFError(), "EOFError"), (OSError("\n"), "OSError"), (KeyError("k"), "'k'")],
)
def test_the_first_line_of_an_error_is_there_whatever_it_says(error, line):
    assert first_line(error) == line


def test_a_count_agrees_with_what_it_is_of():
    said = [amount(count, "record") for count in (0, 1, 2000)]
    assert said == ["0 records", "1 record", "2,000 records"]
    assert [amount(count, "reply is", "replies are") for count in (1, 2)] == ["1 reply is", "2 replies are"]


def test_bad_input_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: record 17: image not found run something"]
    debug = subprocess.run([sys.executable, "-c", COMMAND, "--debug"], capture_output=True, text=True)
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize(
    "raised",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB\\nmore')",
        "torch.AcceleratorError('CUDA error: out of memory\\nSearch for it', 2)",
        "MemoryError()",
    ],
)
def test_no_memory_is_one_line(raised):
    code = f"import torch; from llava.commandline import run\ndef main(): raise {raised}\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: out of memory: ") and "llava-med estimate" in done.stderr


def test_other_errors_keep_their_traceback():
    code = "from llava.commandline import run\ndef main(): raise RuntimeError('shapes differ')\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_results_do_not_steer_the_terminal(capsys):
    """A model may answer anything, and a file may be called so."""
    write_line("\x1b]0;title\x07no\x9b2Jdule\r\nin the\tlung\rtwo\n胸部 👩\u200d⚕")
    assert capsys.readouterr().out == ("\\x1b]0;title\\x07no\\x9b2Jdule\r\nin the\tlung\\rtwo\n胸部 👩\u200d⚕\n")


@pytest.mark.parametrize(("encoding", "arrow"), [("ascii", r"\u2192"), ("utf-8", "→")])
def test_results_are_shown_whatever_the_terminal_can_write(encoding, arrow):
    """A name of a file that isn't UTF-8, as old archives have them; a terminal that isn't either."""
    code = "import sys; from llava.commandline import run, write_line; run(lambda: write_line(sys.argv[1]))"
    words = [sys.executable, "-c", code, b"m\xfcller \xe2\x86\x92"]
    done = subprocess.run(
        words, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == rf"m\udcfcller {arrow}" + "\n"
