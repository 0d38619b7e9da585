"""Converters of captioned figures: ROCO and PubMed Central."""

import json
import sys

import pytest

from llava.data.convert import main
from llava.data.record_checks import check_form
from llava.data.sources.roco import read_captions, read_licences
from llava.errors import LlavaError
from llava.records import read_json, read_records


@pytest.fixture
def roco(tmp_path):
    folder = tmp_path / "roco"
    (folder / "images").mkdir(parents=True)
    (folder / "captions.txt").write_text(
        "ROCO_00002\t First line\nsecond line, see ROCO_00004\tand\x0bmore\n\nROCO_00004\t Two\nROCO_00006\t Three\n"
        "ROCO_00008\t \n"
    )
    (folder / "licences.txt").write_text(
        "ROCO_ID,PMC_ID,CC\nROCO_00002,PMC1_a-g1.jpg,CC BY\nROCO_00004,PMC2_b_2.jpg,CC BY-NC\n"
        "ROCO_00006,PMC3_c.jpg,CC BY\nROCO_00008,PMC4_d.jpg,CC BY\n"
    )
    (folder / "images" / "ROCO_00002.jpg").write_bytes(b"x")
    (folder / "images" / "PMC2_b_2.jpg").write_bytes(b"x")
    return folder


def run_roco(folder, *flags):
    main(["roco", "--folder", str(folder), "--output-dir", str(folder / "out"), *flags])
    return read_records(folder / "out" / "train.json")


def test_roco_records(roco):
    first, second = run_roco(roco)
    assert first == {
        "id": "00002",
        "image": "ROCO_00002.jpg",
        "conversations": [
            {
                "from": "human",
                "value": "The following image is a radiology scan. Deeply analyze and diagnose this image.\n<image>",
            },
            {"from": "gpt", "value": "First line\nsecond line, see ROCO_00004\tand\x0bmore"},
        ],
        "licence": "CC BY",
        "source": "PMC1_a-g1.jpg",
    }
    # The other way images are named, by how they were fetched.
    assert (second["id"], second["image"]) == ("00004", "PMC2_b_2.jpg")
    manifest = read_json(roco / "out" / "manifest.json")
    assert manifest["left_out"] == {"empty caption": 1}
    assert manifest["missing_images"]["first"] == ["ROCO_00006.jpg"]


@pytest.mark.parametrize(
    ("name", "flags"), [("captions.txt", ()), ("licences.txt", ()), ("dlinks.txt", ("--write-urls",))]
)
def test_roco_files_that_are_not_utf_8_are_named(roco, name, flags):
    (roco / name).write_bytes(b"ROCO_ID,PMC_ID,CC\nROCO_00002\tcaf\xe9\n")
    with pytest.raises(LlavaError, match=rf"{name}: not UTF-8"):
        run_roco(roco, *flags)


def test_roco_licence_filter(roco):
    assert [row["id"] for row in run_roco(roco, "--licence", "CC BY-NC", "--missing", "keep")] == ["00004"]
    with pytest.raises(LlavaError, match=r"--licence CC-BY: not in .*CC BY, CC BY-NC"):
        run_roco(roco, "--licence", "CC-BY")


def test_shell_commands_in_links_are_parsed_and_never_run(roco, monkeypatch):
    target = roco / "ran"
    (roco / "dlinks.txt").write_text(
        f"ROCO_00002\twget -r ftp://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/3f/46/PMC1.tar.gz; touch {target}\n"
        f"ROCO_00004\tcurl 'https://example.org/PMC2.tar.gz'$(touch {target}) && touch {target}\n"
        f"ROCO_00006\ttouch {target}\n"
        "not a record\n"
    )
    started = []
    sys.addaudithook(lambda event, args: started.append(event) if event in _RUNS_A_PROGRAM else None)
    run_roco(roco, "--write-urls", "--missing", "keep")
    assert not started and not target.exists()
    assert read_records(roco / "out" / "image_urls.jsonl") == [
        {
            "pair_id": "ROCO_00002",
            "pmc_tar_url": "https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/3f/46/PMC1.tar.gz",
            "image_file_path": "PMC1/a-g1.jpg",
        },
        {
            "pair_id": "ROCO_00004",
            "pmc_tar_url": "https://example.org/PMC2.tar.gz",
            "image_file_path": "PMC2/b_2.jpg",
        },
    ]


_RUNS_A_PROGRAM = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"}


def test_real_roco_keeps_every_caption_and_licence(shared_dir, tmp_path):
    source = shared_dir / "roco"
    main(["roco", "--folder", str(source), "--output-dir", str(tmp_path)])
    rows = read_records(tmp_path / "train.json")
    captions, licences = dict(read_captions(source / "captions.txt")), read_licences(source / "licences.txt")
    assert len(rows) == 8179 == len(captions)
    for row in rows:
        name = f"ROCO_{row['id']}"
        assert row["conversations"][1]["value"] == captions[name]
        assert row["licence"] == licences[name].code
    # Nothing of the file is lost: every byte is an id, a tab, a caption or blanks around one.
    whole = (source / "captions.txt").read_bytes().decode()
    assert "".join("".join(whole.split())) == "".join("".join((k + v).split()) for k, v in captions.items())


def caption_file(tmp_path, content):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    return str(path)


def run_pmc(tmp_path, content, *flags):
    main(["pmc", "--captions", caption_file(tmp_path, content), "--output-dir", str(tmp_path / "out"), *flags])
    return read_records(tmp_path / "out" / "train.json")


def test_pmc_question_by_caption_length(tmp_path):
    from llava.data.sources.pmc import BRIEF, DETAILED

    pairs = [{"pair_id": f"{n}_F1", "fig_caption": " ".join(["word"] * n)} for n in (1, 29, 30, 90)]
    rows = run_pmc(tmp_path, {"mri": pairs})
    questions = [row["conversations"][0]["value"].removesuffix("\n<image>") for row in rows]
    assert [question in BRIEF for question in questions] == [True, True, False, False]
    assert [question in DETAILED for question in questions] == [False, False, True, True]
    assert rows[0]["image"] == "1_F1.jpg"
    assert [name for name, there in rows[0]["domain"].items() if there] == ["mri"]
    assert run_pmc(tmp_path, {"mri": pairs}) == rows, "the choice isn't repeatable"


def test_pmc_brief_is_as_short_as_asked(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"brief": ["Short?"], "detailed": ["Long?"]}))
    pairs = [{"pair_id": str(n), "caption": " ".join(["word"] * n)} for n in (4, 5)]
    rows = run_pmc(tmp_path, pairs, "--questions", str(own), "--brief-below", "5")
    assert [row["conversations"][0]["value"] for row in rows] == ["Short?\n<image>", "Long?\n<image>"]


def test_pmc_all_questions_are_used_and_own_ones_can_be_given(tmp_path):
    pairs = [{"pair_id": str(n), "caption": "short"} for n in range(300)]
    assert len({row["conversations"][0]["value"] for row in run_pmc(tmp_path, pairs)}) == 11
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"brief": ["Short?"], "detailed": ["Long?"]}))
    rows = run_pmc(tmp_path, pairs, "--questions", str(own), "--overwrite")
    assert {row["conversations"][0]["value"] for row in rows} == {"Short?\n<image>"}


def test_pmc_pair_in_two_domains_is_one_record(tmp_path):
    pair = {"pair_id": "1_F1", "fig_caption": "x"}
    (row,) = run_pmc(tmp_path, {"mri": [pair], "ct_scan": [pair]})
    assert [name for name, there in row["domain"].items() if there] == ["mri", "ct_scan"]


@pytest.mark.parametrize("start", ["", "\ufeff", "\ufeff \n" + 100 * " "])
def test_pmc_domains_are_read_whatever_stands_before_them(tmp_path, start):
    path = tmp_path / "captions.json"
    path.write_text(start + json.dumps({"mri": [{"pair_id": 0, "caption": 7}], "ct_scan": []}, indent=1))
    main(["pmc", "--captions", str(path), "--output-dir", str(tmp_path / "out")])
    (row,) = read_records(tmp_path / "out" / "train.json")
    assert (row["id"], row["conversations"][1]["value"], row["domain"]["mri"]) == ("0", "7", True)


def test_pmc_a_list_of_domains_is_kept(tmp_path):
    (row,) = run_pmc(tmp_path, [{"pair_id": "a", "caption": "x", "domain": ["mri", "ct_scan"]}])
    assert [name for name, there in row["domain"].items() if there] == ["mri", "ct_scan"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mri": [3]}, '"mri" record 0: expected an object, got int'),
        ({"mri": {}}, '"mri" holds dict, expected a list'),
        ([{"pair_id": "a", "caption": ["x"]}], 'record 0: "caption" has to be text or a number, not list'),
        ([{"pair_id": "a", "image": ["a.jpg"], "caption": "x"}], 'record 0: "image" has to be text'),
        ([{"pair_id": " ", "caption": "x"}], 'record 0: no "pair_id"'),
    ],
)
def test_pmc_bad_entries_are_named(tmp_path, content, message):
    with pytest.raises(LlavaError, match=message):
        run_pmc(tmp_path, content)


def test_options_that_are_letters_are_left_out_where_answers_are_texts(tmp_path):
    from llava.data.convert import main

    table = tmp_path / "t.csv"
    table.write_text(
        "Figure_path,Question,Choice A,Choice B,Choice C,Choice D,Answer\n"
        "a.jpg,Which panel?,A:A,B:B,C:C,D:D,A\na.jpg,Which side?,A:left,B:right,C:both,D:none,B\n"
    )
    main(["mcq", "--input", str(table), "--output-dir", str(tmp_path / "o"), "--orders", "2", "--answer", "text"])
    from llava.eval.metrics.choice import chosen_option

    for one in json.loads((tmp_path / "o" / "test.json").read_text()):
        answer = one["conversations"][1]["value"]
        assert one["options"][chosen_option(answer, one["options"])] == answer


def test_options_with_a_mark_of_an_image_are_left_out(tmp_path):
    """Training would have looked for a second image."""
    table = tmp_path / "t.csv"
    table.write_text(
        "Figure_path,Question,Choice A,Choice B,Choice C,Choice D,Answer\n"
        "a.jpg,Which?,A:<image>,B:b,C:c,D:d,B\na.jpg,Which side?,A:left,B:right,C:both,D:none,B\n"
    )
    main(["mcq", "--input", str(table), "--output-dir", str(tmp_path / "o")])
    (record,) = read_records(tmp_path / "o" / "test.json")
    assert check_form(record) == []
    assert read_json(tmp_path / "o" / "manifest.json")["left_out"] == {"an option holds <image>": 1}
