import json

import pytest

from llava.folders import remove_parts
from llava.train.output.checkpoints import (
    find_damage,
    last_good_checkpoint,
    list_checkpoints,
    publish,
    remove_old,
    staging_of,
)


def make(output_dir, step, content=b"weights"):
    final = output_dir / f"checkpoint-{step}"
    staging = staging_of(final)
    (staging / "model.safetensors").write_bytes(content)
    (staging / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    publish(staging, final)
    return final


def test_the_newest_whole_checkpoint_is_found_by_number(tmp_path):
    assert last_good_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        make(tmp_path, step)
    assert last_good_checkpoint(tmp_path).name == "checkpoint-10"


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "state"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, caplog, damage):
    make(tmp_path, 5)
    last = make(tmp_path, 6)
    path = last / "model.safetensors"
    if damage == "cut":
        path.write_bytes(b"weig")
    elif damage == "flip":
        path.write_bytes(b"weighty")
    elif damage == "remove":
        path.unlink()
    else:
        (last / "trainer_state.json").write_text("{")
    assert find_damage(last)
    assert last_good_checkpoint(tmp_path).name == "checkpoint-5"
    assert "checkpoint-6" in caplog.text


def test_what_was_being_written_when_killed_is_no_checkpoint(tmp_path, caplog):
    make(tmp_path, 5)
    (staging_of(tmp_path / "checkpoint-6") / "model.safetensors").write_bytes(b"wei")
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-5"]
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_old_checkpoints_go_but_never_the_last_good_one(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    remove_old(tmp_path, 2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    make(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    good = make(tmp_path, 1)
    remove_old(tmp_path, 1)
    assert good.is_dir()
