"""A published folder is whole or not there, whoever is killed, fails or comes second."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava.commandline import existing_dir, existing_file
from llava.errors import LlavaError
from llava.eval.answers.local import LocalModel
from llava.folders import (
    PART,
    check_target,
    expanded,
    final_name,
    model_name,
    part_in,
    part_of,
    publish_files,
    publish_folder,
    remove_parts,
    stage,
    stage_files,
)

ROOT = Path(__file__).resolve().parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, **contents: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content)


def test_a_checkpoint_is_called_by_its_folder_however_it_is_named(tmp_path, monkeypatch):
    checkpoint = tmp_path / "vqa" / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    monkeypatch.chdir(checkpoint)
    for path in (".", "./", checkpoint, f"{checkpoint}/", "runs/vqa/checkpoint-40"):
        assert model_name(path) == "vqa_checkpoint-40"
    assert model_name("microsoft/llava-med-7b") == "llava-med-7b"
    assert LocalModel(".").model_id == "vqa_checkpoint-40"


def test_the_home_folder_of_nobody_is_a_name_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expanded("~/models") == tmp_path / "models"
    assert expanded("~no-such-user/models") == Path("~no-such-user/models")
    assert check_target("~no-such-user/models") == tmp_path / "~no-such-user" / "models"
    for find, kind in ((existing_file, "question file"), (existing_dir, "image folder")):
        with pytest.raises(LlavaError, match=f"{kind}.*~no-such-user"):
            find("~no-such-user/models", kind)
    others = [path for path in (ROOT / "llava").rglob("*.py") if ".expanduser()" in path.read_text()]
    assert not others, "Path.expanduser raises for a user that isn't there; llava.folders.expanded doesn't"


@pytest.mark.parametrize("exchanges", [True, False], ids=["at once", "a disk that can't"])
def test_a_staged_folder_replaces_the_whole_target(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr("llava.folders._exchange", lambda *_: False)
    target = tmp_path / "new" / "target"
    with stage(target) as part:
        assert part == part_of(target) and final_name(part) == final_name(target) == "target"
        write(part / "inner", a="1")
        assert not target.exists()
    assert names(target) == ["inner"] and names(target.parent) == ["target"]
    with pytest.raises(LlavaError, match="isn't empty"), stage(target):
        pass
    with stage(target, overwrite=True) as part:
        write(part, b="2")
    assert names(target) == ["b"] and names(target.parent) == ["target"]


def test_staged_files_join_what_the_folder_holds(tmp_path):
    write(tmp_path, last="old", notes="mine", old_1="old", old_2="old")
    with stage_files(tmp_path, last="last", stale=["old_*"]) as part:
        assert part == part_in(tmp_path)
        write(part, last="new", old_2="new")
        assert (tmp_path / "last").read_text() == "old"
    assert names(tmp_path) == ["last", "notes", "old_2"]
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["new", "mine", "new"]


@pytest.mark.parametrize("error", [ValueError("no"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_everything_as_it_was(tmp_path, error):
    write(tmp_path / "there", last="old")
    expected = LlavaError if isinstance(error, OSError) else type(error)
    for context in (
        lambda: stage(tmp_path / "a" / "b"),
        lambda: stage_files(tmp_path / "c" / "d", last="last"),
        lambda: stage_files(tmp_path / "there", last="last"),
    ):
        with pytest.raises(expected), context() as part:
            write(part, last="new")
            raise error
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == ["last"]
    assert (tmp_path / "there" / "last").read_text() == "old"


def kill_while_staging(code: str) -> None:
    code = f"import os\nfrom llava.folders import *\nfrom pathlib import Path\n{code}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_writer_leaves_is_handed_on_only_as_asked(tmp_path):
    target = tmp_path / "target"
    script = (
        f"with stage({str(target)!r}, resume=['journal', '*.kept']) as part:\n"
        "    [(part / name).write_text('1') for name in ('journal', 'a.kept', 'other')]\n"
        "    (part / 'folder').mkdir()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    kill_while_staging(script)
    assert not target.exists() and part_of(target).is_dir()
    with stage(target, resume=["journal", "*.kept"]) as part:
        assert {"journal", "a.kept"} == set(names(part)) - {"lock"}
        (part / "journal").unlink()
    assert names(target) == ["a.kept"]
    kill_while_staging(script.replace("target'", "other'"))
    with stage(tmp_path / "other") as part:
        assert set(names(part)) <= {"lock"}
    assert names(tmp_path / "other") == []


def test_killed_while_it_is_replaced_a_folder_is_the_old_or_the_new_one(tmp_path):
    target = tmp_path / "target"
    for renames in (1, 2):
        write(target, content="old")
        kill_while_staging(
            "replace, done = Path.replace, []\n"
            "def replace_one(self, target):\n"
            "    replace(self, target)\n"
            "    done.append(target)\n"
            f"    len(done) < {renames} or os.kill(os.getpid(), 9)\n"
            "Path.replace = replace_one\n"
            f"with stage({str(target)!r}, overwrite=True) as part:\n"
            "    (part / 'content').write_text('new')\n"
            "os.kill(os.getpid(), 9)\n"
        )
        assert (target / "content").read_text() == ("old" if renames == 1 else "new")
    with stage(target, overwrite=True) as part:
        write(part, content="newer")
    assert names(tmp_path) == ["target"] and (target / "content").read_text() == "newer"


def test_a_killed_publication_is_finished_by_the_next(tmp_path):
    """Killed between its steps: the folder has no last file and so counts as unfinished, until the next one."""
    write(tmp_path / "out", last="old", first="old", more="old")
    kill_while_staging(
        "replace, count = Path.replace, []\n"
        "def replace_one(self, target):\n"
        "    replace(self, target)\n"
        "    os.kill(os.getpid(), 9)\n"
        "Path.replace = replace_one\n"
        f"with stage_files({str(tmp_path / 'out')!r}, last='last') as part:\n"
        "    [(part / name).write_text('new') for name in ('first', 'last', 'more')]\n"
    )
    assert "last" not in names(tmp_path / "out") and (tmp_path / "out" / "first").read_text() == "new"
    with stage_files(tmp_path / "out", last="last") as part:
        write(part, first="newer", last="newer", more="newer")
    assert names(tmp_path / "out") == ["first", "last", "more"]
    assert {path.read_text() for path in (tmp_path / "out").iterdir()} == {"newer"}


def test_only_one_process_at_a_time(tmp_path):
    for context in (lambda: stage(tmp_path / "a"), lambda: stage_files(tmp_path / "b", last="last")):
        with context() as part:
            write(part, last="first")
            with pytest.raises(LlavaError, match="another process is writing"), context():
                pass
    assert names(tmp_path / "a") == names(tmp_path / "b") == ["last"]


def test_final_files_replace_older_ones_of_another_count(tmp_path):
    write(tmp_path / "out", **dict.fromkeys(("model-00001-of-00002.safetensors", "config.json", "notes.txt"), "old"))
    write(tmp_path / "part", **dict.fromkeys(("model.safetensors", "config.json"), "new"))
    publish_files(tmp_path / "part", tmp_path / "out", last="config.json", stale=["model*.safetensors*"])
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", "notes.txt"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_unfinished_folders_are_removed_and_named(tmp_path, caplog):
    write(part_of(tmp_path / "checkpoint-5"), weights="half")
    write(tmp_path / "checkpoint-4", weights="whole")
    (tmp_path / f"answers.jsonl{PART}").write_text("resumable")
    remove_parts(tmp_path)
    assert names(tmp_path) == [f"answers.jsonl{PART}", "checkpoint-4"] and "checkpoint-5" in caplog.text
    write(part_of(tmp_path / "checkpoint-4"), weights="new")
    publish_folder(part_of(tmp_path / "checkpoint-4"), tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "weights").read_text() == "new"


def test_published_files_have_the_umasks_mode(tmp_path):
    """safetensors writes private files."""
    import torch
    from safetensors.torch import save_file

    old = os.umask(0o027)
    try:
        for name, opened in (
            ("whole", stage(tmp_path / "whole")),
            ("files", stage_files(tmp_path / "files", last="x")),
        ):
            with opened as part:
                save_file({"a": torch.zeros(1)}, part / "x")
            assert (tmp_path / name / "x").stat().st_mode & 0o777 == 0o640, name
    finally:
        os.umask(old)
