"""Converters of the question-answer sets, on rows made here and on the real files."""

import hashlib
import json
import os
import pickle

import pytest

from llava.data.audit_checks import audit_splits
from llava.data.convert import main
from llava.data.vqa_items import read_vqa_items
from llava.errors import LlavaError
from llava.record_content import image_key
from llava.records import read_json, read_records, write_records

ROWS = [
    {"qid": 7, "image_name": "a.jpg", "image_organ": "HEAD", "question": " How many? ", "question_type": "COUNT",
     "phrase_type": "freeform", "answer": 4, "answer_type": "OPEN"},
    {"qid": 8, "image_name": "b.jpg", "image_organ": "ABD", "question": "Is it normal?", "question_type": "PRES, ATRIB",
     "phrase_type": "para", "answer": "Yes ", "answer_type": "CLOSED "},
]  # fmt: skip


@pytest.fixture
def work(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.jpg").write_bytes(b"x")
    return tmp_path


def put(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def vqa_rad(work, *flags):
    return main(["vqa-rad", "--image-folder", str(work / "images"), "--output-dir", str(work / "out"), *flags])


def test_record_form_and_cleaning(work):
    vqa_rad(work, "--train", put(work / "train.json", ROWS))
    first, second = read_records(work / "out" / "train.json")
    assert first == {
        "id": "7",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "How many?\n<image>"}, {"from": "gpt", "value": "4"}],
        "answer_type": "OPEN",
        "question_type": "COUNT",
        "image_organ": "HEAD",
        "phrase_type": "freeform",
    }
    assert second["answer_type"] == "CLOSED"
    assert second["conversations"][1]["value"] == "Yes"
    assert second["question_type"] == "PRES, ATTRIB"
    manifest = read_json(work / "out" / "manifest.json")
    assert manifest["corrected"]["answer was a number"] == 1
    written = (work / "out" / "train.json").read_bytes()
    assert manifest["splits"]["train"]["sha256"] == hashlib.sha256(written).hexdigest()
    assert read_json(work / "out" / "candidates.json") == {"0": ["4"]}


def test_original_release_is_split_by_phrase_type(work):
    rows = [{**ROWS[0], "phrase_type": kind, "qid": number} for number, kind in
            enumerate(["freeform", "para", "test_freeform", "test_para", "test_para"])]  # fmt: skip
    vqa_rad(work, "--public", put(work / "public.json", rows))
    assert len(read_records(work / "out" / "train.json")) == 2
    assert [row["id"] for row in read_records(work / "out" / "test.json")] == ["2", "3", "4"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_other_formats_hold_the_same_records(work, suffix):
    train = put(work / "train.json", ROWS)
    vqa_rad(work, "--train", train)
    vqa_rad(work, "--train", train, "--format", suffix)
    assert read_records(work / "out" / f"train.{suffix}") == read_records(work / "out" / "train.json")


def test_missing_images_stop_or_are_counted(work):
    rows = [*ROWS, {**ROWS[0], "qid": 9, "image_name": "gone.jpg"}]
    train = put(work / "train.json", rows)
    with pytest.raises(LlavaError, match=r"1 image of 1 record not .*gone\.jpg.*--missing drop"):
        vqa_rad(work, "--train", train)
    assert not (work / "out").exists(), "something half-written was left"
    vqa_rad(work, "--train", train, "--missing", "drop")
    assert len(read_records(work / "out" / "train.json")) == 2
    assert read_json(work / "out" / "manifest.json")["missing_images"]["records"] == 1
    vqa_rad(work, "--train", train, "--missing", "keep", "--overwrite")
    assert len(read_records(work / "out" / "train.json")) == 3


def test_images_whose_names_are_in_another_unicode_form_are_counted(work, capsys):
    name = next(path.name for path in (work / "images").iterdir())
    (work / "images" / "ro\u0308.jpg").write_bytes((work / "images" / name).read_bytes())
    rows = [
        {**ROWS[0], "qid": number, "image_name": name} for number, name in enumerate((name, "r\u00f6.jpg", "no.jpg"))
    ]
    train = put(work / "train.json", rows)
    with pytest.raises(LlavaError, match=r"; 1 of them is there under a name in another Unicode form .*--missing drop"):
        vqa_rad(work, "--train", train)
    vqa_rad(work, "--train", train, "--missing", "drop")
    assert read_json(work / "out" / "manifest.json")["missing_images"]["in_another_unicode_form"] == 1
    assert "  there under a name in another Unicode form (NFC, NFD): 1" in capsys.readouterr().out


def test_a_question_that_is_a_number_is_text_and_counted(work):
    vqa_rad(work, "--train", put(work / "train.json", [{**ROWS[0], "question": 4}]))
    (record,) = read_records(work / "out" / "train.json")
    assert record["conversations"][0]["value"] == "4\n<image>"
    assert read_json(work / "out" / "manifest.json")["corrected"]["question was a number"] == 1


def test_a_long_reason_is_shown_in_short(work, capsys):
    rows = [{"img_name": "a.jpg", "question": "CT?", "answer": "Yes", "answer_type": "CLOSED", "qid": 1, "q_lang": lang}
            for lang in ("en", 5000 * "x")]  # fmt: skip
    main(["slake", "--train", put(work / "t.json", rows), "--image-folder", str(work / "images"),
          "--output-dir", str(work / "out")])  # fmt: skip
    shown = capsys.readouterr().out
    assert "1 record left out: question in another language (xxx" in shown and max(map(len, shown.splitlines())) < 300


def test_empty_answers_are_left_out_and_counted(work):
    vqa_rad(work, "--train", put(work / "train.json", [*ROWS, {**ROWS[0], "qid": 9, "answer": " "}]))
    assert len(read_records(work / "out" / "train.json")) == 2
    assert read_json(work / "out" / "manifest.json")["left_out"] == {"empty answer": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_type": "MAYBE"}, "record 2: answer_type is 'MAYBE'"),
        ({"qid": 7}, 'the id "7" occurs twice'),
        ({"image_name": "../secret.jpg"}, "leads out of the image folder"),
        ({"image_name": "/etc/passwd"}, "leads out of the image folder"),
        ({"image_name": None}, 'record 2: "image_name" is empty'),
        ({"qid": " "}, 'record 2: "qid" is empty'),
        ({"answer": ["yes"]}, 'record 2: "answer" has to be text or a number, not list'),
        ({"question": {"text": "How many?"}}, 'record 2: "question" has to be text or a number, not dict'),
        ({"image_name": 300 * "a" + ".jpg"}, "image of 1 record not found"),
    ],
)
def test_bad_rows_are_named(work, change, message):
    with pytest.raises(LlavaError, match=message):
        vqa_rad(work, "--train", put(work / "train.json", [*ROWS, {**ROWS[0], "qid": 9, **change}]))
    assert not (work / "out").exists()


def test_real_vqa_rad_is_whole_and_clean(shared_dir, tmp_path):
    source = shared_dir / "vqa_rad"
    main(["vqa-rad", "--train", str(source / "trainset.json"), "--test", str(source / "testset.json"),
          "--image-folder", str(source / "images"), "--output-dir", str(tmp_path)])  # fmt: skip
    train, test = read_records(tmp_path / "train.json"), read_records(tmp_path / "test.json")
    raw = read_json(source / "trainset.json")
    assert (len(train), len(test)) == (len(raw), 451)
    by_id = {str(row["qid"]): row for row in raw}
    for row in train + test:
        answer = row["conversations"][1]["value"]
        assert isinstance(answer, str) and answer == answer.strip() and answer
        assert row["answer_type"] in ("OPEN", "CLOSED")
    for row in train:
        assert row["conversations"][1]["value"] == str(by_id[row["id"]]["answer"]).strip()
    assert sum(isinstance(row["answer"], int) for row in raw) > 0, "the file no longer tests what it should"


def slake_row(number, language="en", answer_type="CLOSED", answer="Lung"):
    return {"img_id": 1, "img_name": "x1/source.jpg", "question": "Which?", "answer": answer, "q_lang": language,
            "location": "Lung", "modality": "CT", "answer_type": answer_type, "base_type": "vqa",
            "content_type": "Organ", "qid": number}  # fmt: skip


@pytest.mark.parametrize(("language", "ids"), [("en", ["1"]), ("zh", ["2"]), ("all", ["1", "2"])])
def test_slake_language_and_type(tmp_path, language, ids):
    (tmp_path / "imgs" / "x1").mkdir(parents=True)
    (tmp_path / "imgs" / "x1" / "source.jpg").write_bytes(b"x")
    put(tmp_path / "validation.json", [slake_row(1), slake_row(2, "zh", "OPEN", "肺")])
    main(["slake", "--folder", str(tmp_path), "--language", language, "--output-dir", str(tmp_path / "out")])
    rows = read_records(tmp_path / "out" / "validate.json")
    assert [row["id"] for row in rows] == ids
    # An answer that isn't yes or no is CLOSED where the set says so.
    assert {row["id"]: row["answer_type"] for row in rows} == {n: {"1": "CLOSED", "2": "OPEN"}[n] for n in ids}


def test_slake_files_one_by_one(tmp_path):
    main(["slake", "--validate", put(tmp_path / "mine.json", [slake_row(1)]), "--output-dir", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["manifest.json", "validate.json"]


def test_real_slake_counts(shared_dir, tmp_path):
    main(["slake", "--test", str(shared_dir / "slake" / "test.json"), "--output-dir", str(tmp_path)])
    manifest = read_json(tmp_path / "manifest.json")["splits"]["test"]
    assert (manifest["records"], manifest["answer_types"]) == (1061, {"OPEN": 645, "CLOSED": 416})


def path_vqa_folder(folder, rows, protocol=4):
    (folder / "qas").mkdir()
    (folder / "qas" / "val_qa.pkl").write_bytes(pickle.dumps(rows, protocol))
    (folder / "images" / "val").mkdir(parents=True)
    (folder / "images" / "val" / "val_0001.jpg").write_bytes(b"x")


@pytest.mark.parametrize("protocol", range(6))
def test_path_vqa_from_pickles(tmp_path, protocol):
    rows = [
        {"image": "val_0001", "question": "is it there?", "answer": "Yes"},
        {"image": "val_0001", "question": "what is it?", "answer": "no necrosis"},
    ]
    path_vqa_folder(tmp_path, rows, protocol)
    main(["pathvqa", "--folder", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    rows = read_records(tmp_path / "out" / "validate.json")
    assert [row["answer_type"] for row in rows] == ["CLOSED", "OPEN"]
    assert rows[0]["image"] == "val/val_0001.jpg"


class RunsCode:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    target = tmp_path / "ran"
    path_vqa_folder(tmp_path, [{"image": "val_0001", "question": RunsCode(target), "answer": "x"}])
    with pytest.raises(LlavaError, match=r"asks for \w+\.system"):
        main(["pathvqa", "--folder", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    assert not target.exists()
    pickle.loads((tmp_path / "qas" / "val_qa.pkl").read_bytes())
    assert target.exists(), "the attack itself doesn't work; the test shows nothing"


@pytest.mark.parametrize(
    "content",
    [b"\x80\x04not a pickle", b"\x80\x02\x8b\xff\xff\xff\xff"],
    ids=["text", "an integer of -1 bytes"],
)
def test_broken_pickle_is_one_clear_error(tmp_path, content):
    path_vqa_folder(tmp_path, [])
    (tmp_path / "qas" / "val_qa.pkl").write_bytes(content)
    with pytest.raises(LlavaError, match="not a pickle of plain values"):
        main(["pathvqa", "--folder", str(tmp_path), "--output-dir", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["pathvqa", "vqa-rad"])
def test_hub_parquet_images_come_out_byte_equal(tmp_path, name):
    images = [b"\xff\xd8\xff one", b"\xff\xd8\xff two"]
    rows = [{"image": {"bytes": images[n % 2], "path": None}, "question": f"q{n}?", "answer": "yes" if n else "liver"}
            for n in range(3)]  # fmt: skip
    (tmp_path / "data").mkdir()
    write_records(tmp_path / "data" / "validation-00000-of-00001-ab.parquet", rows)
    main([name, "--parquet", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    written = read_records(tmp_path / "out" / "validate.json")
    assert [row["answer_type"] for row in written] == ["OPEN", "CLOSED", "CLOSED"]
    found = [(tmp_path / "out" / "images" / row["image"]).read_bytes() for row in written]
    assert found == [images[0], images[1], images[0]]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def csv_table(work, text, *flags):
    (work / "my.csv").write_text(text, encoding="utf-8-sig")
    return main(["csv", "--input", str(work / "my.csv"), "--image-folder", str(work / "images"),
                 "--output-dir", str(work / "out"), *flags])  # fmt: skip


def test_csv_with_own_columns(work):
    text = 'file,ask,reply,site\na.jpg,"What, exactly?","two\nlines",A\n,text only?,no,B\n'
    csv_table(work, text, "--image-column", "file", "--question-column", "ask", "--answer-column", "reply",
              "--keep-columns", "site")  # fmt: skip
    first, second = read_records(work / "out" / "train.json")
    assert first["conversations"][0]["value"] == "What, exactly?\n<image>"
    assert first["conversations"][1]["value"] == "two\nlines"
    assert (first["answer_type"], first["site"]) == ("OPEN", "A")
    assert "image" not in second and "<image>" not in second["conversations"][0]["value"]
    assert second["answer_type"] == "CLOSED"


def test_csv_of_other_delimiter_with_ids_and_answer_types(work):
    text = "name;kind;image;question;answer\nfirst;closed;a.jpg;Which, then?;left\nsecond;OPEN;b.jpg;Is it?;no\n"
    csv_table(work, text, "--delimiter", ";", "--id-column", "name", "--answer-type-column", "kind")
    records = read_records(work / "out" / "train.json")
    assert [(record["id"], record["answer_type"]) for record in records] == [("first", "CLOSED"), ("second", "OPEN")]
    assert records[0]["conversations"][0]["value"] == "Which, then?\n<image>"


def test_csv_split_shares_no_image(work):
    for number in range(40):
        (work / "images" / f"{number}.jpg").write_bytes(b"x")
    rows = "".join(f"{number % 40}.jpg,q{number}?,a\n" for number in range(120))
    csv_table(work, "image,question,answer\n" + rows, "--test-fraction", "0.25")
    train, test = (read_records(work / "out" / f"{name}.json") for name in ("train", "test"))
    assert len(train) + len(test) == 120
    assert not {row["image"] for row in train} & {row["image"] for row in test}


def test_an_image_of_two_spellings_is_one(work):
    """Half of the test images were trained on, and the audit said that none was."""
    spellings = [("a.jpg", "./a.jpg"), ("b.jpg", ".//b.jpg"), ("c/c.jpg", "c//c.jpg"), ("d.jpg", "c/../d.jpg")]
    for name in ("c/c.jpg", "d.jpg"):
        (work / "images" / name).parent.mkdir(exist_ok=True)
        (work / "images" / name).write_bytes(b"x")
    rows = "".join(f"{name},q?,a\n" for pair in spellings[:3] for name in pair)
    csv_table(work, "image,question,answer\n" + rows, "--test-fraction", "0.5")
    train, test = (work / "out" / f"{name}.json" for name in ("train", "test"))
    seen = [{image_key(record["image"]) for record in read_records(path)} for path in (train, test)]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == {"a.jpg", "b.jpg", "c/c.jpg"}
    for first, second in spellings:
        asked = [[{"id": "1", "image": name, "question": "q", "answer": "a"}] for name in (first, second)]
        train.write_text(json.dumps(asked[0]))
        test.write_text(json.dumps(asked[1]))
        assert audit_splits(read_vqa_items(train), read_vqa_items(test))["images"]["same_name"] == 1
        assert audit_splits(read_vqa_items(train), read_vqa_items(test))["items"][0]["image_seen"]


def test_a_split_that_is_not_made_any_more_does_not_stay(work, caplog):
    """All its images would be in the new training split."""
    table = "image,question,answer\na.jpg,q?,a\nb.jpg,q?,a\n"
    csv_table(work, table, "--test-fraction", "0.5")
    with pytest.raises(LlavaError, match=r"holds test\.json, which this conversion doesn't make"):
        csv_table(work, table)
    assert len(read_records(work / "out" / "train.json")) == 1
    csv_table(work, table, "--overwrite")
    assert not (work / "out" / "test.json").exists()
    assert len(read_records(work / "out" / "train.json")) == 2
    assert "test.json of an earlier conversion is removed" in caplog.text


def test_splits_that_are_made_one_by_one_stay(work):
    vqa_rad(work, "--train", put(work / "train.json", ROWS))
    vqa_rad(work, "--test", put(work / "test.json", ROWS))
    vqa_rad(work, "--train", str(work / "train.json"))
    assert {path.name for path in (work / "out").iterdir()} >= {"train.json", "test.json"}


@pytest.mark.parametrize("fraction", ["0.001", "0.999"])
def test_csv_of_few_images_is_split_too(work, fraction):
    rows = "".join(f"{name},q?,a\n" for name in ("a.jpg", "b.jpg", "b.jpg"))
    (work / "images" / "b.jpg").write_bytes(b"x")
    csv_table(work, "image,question,answer\n" + rows, "--test-fraction", fraction)
    train, test = (read_records(work / "out" / f"{name}.json") for name in ("train", "test"))
    assert len(train) + len(test) == 3
    assert {row["image"] for row in train} ^ {row["image"] for row in test} == {"a.jpg", "b.jpg"}
    with pytest.raises(LlavaError, match="one image can't be split"):
        csv_table(work, "image,question,answer\na.jpg,q?,a\n", "--test-fraction", fraction)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--keep-columns", "who, question"), "--keep-columns question: records have a field of that name"),
        (("--delimiter", r"\t"), "--delimiter .*: give one character"),
        (("--delimiter", "\n"), "--delimiter .*: give one character"),
    ],
)
def test_csv_flags_that_cannot_be_are_named(work, flags, message):
    with pytest.raises(LlavaError, match=message):
        csv_table(work, "image,question,answer,who\na.jpg,q,a,me\n", *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scan,question,answer\n", "no column image; there are: scan, question, answer"),
        ("image,question,answer\na.jpg,q\n", "line 2: 3 columns expected"),
        ('image,question,answer\na.jpg,"q,a\n', "not a readable table"),
        ("image,question,answer\nz.jpg,q,a\n", r"1 image of 1 record not found .*z\.jpg"),
        (
            "image,question,answer\nz.jpg,q,a\nz.jpg,,a\n",
            r"1 image of 1 record not found .* out; left out besides: 1 with empty question$",
        ),
        ("image,question,answer\n", "no records; is this the right file"),
        ("image,question,answer\na.png,,\n", "no records; left out: 1 with empty question"),
        ("image,question,answer,answer\na.jpg,q,yes,no\n", "2 columns are called answer; rename"),
        ("image,question,answer\nsub\\a.jpg,q,a\n", "isn't spelt as Linux does; give a path below the folder, with /"),
    ],
)
def test_csv_faults_are_named(work, text, message):
    with pytest.raises(LlavaError, match=message):
        csv_table(work, text)


def test_a_row_without_its_id_is_named(work):
    with pytest.raises(LlavaError, match='line 3: "name" is empty'):
        csv_table(work, "name,image,question,answer\n1,a.jpg,q,a\n ,a.jpg,q,a\n", "--id-column", "name")


def test_a_comma_at_the_end_of_keep_columns(tmp_path):
    from llava.data.convert import main

    (tmp_path / "t.csv").write_text("image,question,answer,organ\n,Is it?,yes,HEAD\n")
    main(["csv", "--input", str(tmp_path / "t.csv"), "--output-dir", str(tmp_path / "o"), "--keep-columns", "organ,"])
    assert json.loads((tmp_path / "o" / "train.json").read_text())[0]["organ"] == "HEAD"
