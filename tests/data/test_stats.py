"""Verbs, objects, domains and lengths of an instruct file, and the figure made of them."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("textblob", reason='textblob is in the extra "stats"')
pytest.importorskip("simplemma", reason='simplemma is in the extra "stats"')

from llava.data import stats
from llava.data.stats_count import collect, verb_object_finder
from llava.errors import LlavaError
from llava.records import write_json


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("Describe the image in detail.", ("describe", "image")),
        ("Can you identify any abnormalities in this CT scan?", ("identify", "abnormality")),
        ("The image shows a large mass in the lung.", ("show", "mass")),
        ("Doctors have found several small nodules.", ("find", "nodule")),
        ("Left lung.", None),
    ],
)
def test_verb_and_object(text, pair):
    assert verb_object_finder()(text) == pair


def records():
    turns = [{"from": "human", "value": "Describe the image.\n<image>"}, {"from": "gpt", "value": "It shows a scan."}]
    flags = {"mri": True, "ct_scan": False}
    return [{"id": str(n), "image": "x.png", "domain": flags, "conversations": turns * (1 + n % 2)} for n in range(6)]


def test_counts_and_figure(tmp_path):
    path = tmp_path / "instruct.json"
    write_json(path, records())
    stats = collect(path)
    assert stats.domains == {"mri": 6}
    assert stats.verbs["instructions"][("describe", "image")] == 9
    assert stats.lengths["instructions"] == [3] * 9
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llava.data.stats", str(path), "--output-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "stats.json").read_text())["turns"] == {"1": 3, "2": 3}
    assert (out / "stats.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "stats.html").read_text()
    assert page.count("<svg ") == page.count("<figcaption>") == 5
    assert done.stdout.startswith("6 records, 9 turns, domains: mri (6)\n")
    assert "describe" in page and "<td>image</td>" in page
    assert "://" not in page


def test_a_record_without_conversations_is_named(tmp_path):
    write_json(tmp_path / "bad.json", [{"id": "r7"}])
    with pytest.raises(LlavaError, match="r7"):
        collect(tmp_path / "bad.json")


def test_speakers_and_images_of_every_kind_are_counted(tmp_path):
    told = [{"role": "system", "content": "Answer."}, {"role": "assistant", "content": "Hello you."}]
    asked = [
        {"from": "user", "value": "Describe the image.\n<image>"},
        {"from": "assistant", "value": "It shows a scan."},
    ]
    rows = [
        {"id": "u", "images": ["p.png"], "domain": "mri", "messages": [*told, *asked]},
        {"id": "t", "conversations": asked},
    ]
    write_json(tmp_path / "x.json", rows)
    stats = collect(tmp_path / "x.json")
    assert (stats.text_only, stats.turns, stats.domains) == (1, [1, 1], {"mri": 1})
    assert stats.lengths == {"instructions": [3, 3], "responses": [2, 4, 4]}


@pytest.mark.parametrize("number", ["0", "-1"])
def test_no_records_are_no_number_to_read(tmp_path, number):
    with pytest.raises(LlavaError, match=f"--max-records {number}: give 1 or more"):
        stats.main([str(tmp_path / "instruct.json"), "--output-dir", str(tmp_path), "--max-records", number])


def test_the_first_so_many_records_are_read(tmp_path, capsys):
    write_json(tmp_path / "instruct.json", [{**one, "domain": None} for one in records()])
    stats.main([str(tmp_path / "instruct.json"), "--output-dir", str(tmp_path / "out"), "--max-records", "3"])
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["turns"] == {"1": 2, "2": 1}
    assert "domains: none given\n" in capsys.readouterr().out
