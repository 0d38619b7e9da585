"""Every fault of a record is found, counted, shown, and put right or left out by --fix."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.data import filter_missing, split_long_conversation, validate
from llava.data.record_checks import FAULTS, _is_plainly_good, check_form
from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.records import read_json, read_records, write_records
from llava.tokenization import ImageTokens, encode_conversation
from tests.tiny import make_llava, make_tokenizer


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def record(name, *texts, image="a.png", **fields):
    return {"id": name, **({"image": image} if image else {}), "conversations": turns(*texts), **fields}


GOOD = record("good", "What?\n<image>", "A lung.")
CASES = {
    "form": {"id": "form", "image": "a.png"},
    "first_turn": {"id": "first_turn", "image": "a.png",
                   "conversations": [{"from": "gpt", "value": "x"}, *turns("<image> q", "a")]},
    "no_answer": record("no_answer", "<image>\nq", "a", "and?"),
    "empty_answer": record("empty_answer", "<image>\nq", " "),
    "image_count": record("image_count", "no mark", "a"),
    "image_in_answer": record("image_in_answer", "<image> q", "a <image>"),
    "image_name": record("image_name", "<image> q", "a", image="../a.png"),
    "image_missing": record("image_missing", "<image> q", "a", image="none.png"),
    "image_other_form": record("image_other_form", "<image> q", "a", image="r\u00f6.png"),
    "image_unreadable": record("image_unreadable", "<image> q", "a", image="cut.png"),
}  # fmt: skip
NOTES = {
    "misspelt_key": {"id": "misspelt_key", "image": "a.png", "conversatons": turns("<image> q", "a")},
    "number_as_text": record("number_as_text", "<image> q", 4),
    "text_only": record("text_only", "q", "a", image=None),
}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.effect_noise((40, 40), 90).convert("RGB").save(folder / "a.png")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "ro\u0308.png").write_bytes(whole)  # as macOS writes it
    return folder


def run(tmp_path, records, *flags, name="in.json"):
    write_records(tmp_path / name, records)
    report = tmp_path / "report.json"
    code = validate.main([str(tmp_path / name), "--report", str(report), "--overwrite", *flags])
    return code, read_json(report)


def test_a_good_file_has_no_fault(tmp_path, images):
    code, report = run(tmp_path, [GOOD], "--image-folder", str(images))
    assert (code, report["records"], report["faulty"], report["faults"]) == (0, 1, 0, {})


@pytest.mark.parametrize("workers", ["1", "2"])
def test_each_fault_is_found_once_and_named(tmp_path, images, workers):
    records = [GOOD, *CASES.values(), *NOTES.values(), {**GOOD, "id": "last"}]
    code, report = run(tmp_path, records, "--image-folder", str(images), "--workers", workers)
    assert code == 1 and report["records"] == len(records) and report["faulty"] == len(CASES)
    assert report["faults"].keys() == CASES.keys()
    for number, kind in enumerate(CASES, 1):
        assert [case["record"] for case in report["faults"][kind]["first"]] == [number], kind
        assert report["faults"][kind]["first"][0]["id"] == kind
    assert report["notes"].keys() == NOTES.keys()


def test_ids_are_compared_as_text(tmp_path):
    _, report = run(tmp_path, [record(id, "<image>", "a") for id in (-1, -2, 3, "3")])
    assert [case["record"] for case in report["notes"]["duplicate_id"]["first"]] == [3]


def test_repeated_ids_and_first_cases(tmp_path):
    records = [record(str(n % 6), "<image>", " ") for n in range(10)]
    _, report = run(tmp_path, records, "--first", "3")
    assert report["notes"]["duplicate_id"]["records"] == 4
    assert report["faults"]["empty_answer"]["records"] == 10
    assert [case["record"] for case in report["faults"]["empty_answer"]["first"]] == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_fix_writes_a_copy_without_faults(tmp_path, images, suffix):
    records = [GOOD, *CASES.values(), *NOTES.values()]
    fixed = tmp_path / f"fixed.{suffix}"
    flags = ["--image-folder", str(images)]
    # Parquet has one type per column, so a text that is a number can't be in such a file.
    records = [row for row in records if suffix != "parquet" or row["id"] not in ("number_as_text", "misspelt_key")]
    run(tmp_path, records, *flags, "--fix", str(fixed), name=f"in.{suffix}")
    kept = {row["id"]: row for row in read_records(fixed)}
    repaired = {"no_answer", "image_count"}
    assert kept.keys() == {"good"} | repaired | ({row["id"] for row in records} & NOTES.keys())
    assert kept["image_count"]["conversations"][0]["value"] == "no mark\n<image>"
    assert len(kept["no_answer"]["conversations"]) == 2
    if suffix != "parquet":
        assert kept["misspelt_key"]["conversations"] == turns("<image> q", "a")
        assert kept["number_as_text"]["conversations"][1]["value"] == "4"
    code, report = run(tmp_path, read_records(fixed), *flags, name=f"again.{suffix}")
    assert code == 0 and report["faults"] == {}


def test_tokens_are_counted_as_in_training(tmp_path):
    make_tokenizer(tmp_path / "llm")
    flags = ["--tokenizer", str(tmp_path / "llm"), "--template", "v1", "--features-per-image", "16"]
    records = [GOOD, record("long", "<image> q", "word " * 400), record("lost", "<image> " + "q " * 800, "a")]
    code, report = run(tmp_path, records, *flags, "--model-max-length", "512")
    assert code == 1
    assert report["faults"]["no_target"]["first"][0]["id"] == "lost"
    assert report["notes"]["truncated"]["records"] == 2
    assert report["positions"]["largest"] > 512
    from llava.model.tokenizer import load_tokenizer
    from llava.tokenization import encode_conversation

    length = len(encode_conversation(GOOD, "v1", load_tokenizer(tmp_path / "llm"), features_per_image=16).input_ids)
    assert report["positions"]["smallest"] == length


@pytest.mark.parametrize("fields", [{}, {"mm_vision_select_feature": "cls_patch", "mm_use_im_start_end": True},
                                    {"conversation_template": "plain"}])  # fmt: skip
def test_the_form_of_samples_is_the_models_own(tmp_path, capsys, fields):
    """Whoever validates with a checkpoint gets the lengths of training from it, without naming anything."""
    model = load_pretrained_model(make_llava(tmp_path, "mistral", **fields))
    patches = 5 if "mm_vision_select_feature" in fields else 4
    # Stage 1's template isn't that of the next stage.
    template = "v0" if fields.get("conversation_template") else "mistral_instruct"
    code, report = run(tmp_path, [GOOD], "--tokenizer", str(tmp_path / "llava"))
    assert code == 0 and f"tokenised with template {template}, {patches} positions an image" in capsys.readouterr().out
    tokens = ImageTokens.from_config(model.model.config, model.tokenizer)
    encoded = encode_conversation(GOOD, template, model.tokenizer, tokens, features_per_image=patches)
    assert model.model.num_patches == patches and report["positions"]["largest"] == len(encoded.input_ids)
    code, report = run(tmp_path, [GOOD], "--tokenizer", str(tmp_path / "llava"), "--template", "v1",
                       "--features-per-image", "30", "--mm-use-im-start-end", "False")  # fmt: skip
    encoded = encode_conversation(GOOD, "v1", model.tokenizer, features_per_image=30)
    assert report["positions"]["largest"] == len(encoded.input_ids)
    long = record("long", "<image>\nq0", "a0 " * 30, "q1", "a1 " * 30)
    write_records(tmp_path / "long.json", [long])
    length = len(encode_conversation(long, template, model.tokenizer, tokens, features_per_image=patches).input_ids)
    for limit, pieces in ((length, 1), (length - 1, 2)):
        out = tmp_path / f"{limit}.json"
        split_long_conversation.main(["--in-file", str(tmp_path / "long.json"), "--out-file", str(out),
                                      "--model-name-or-path", str(tmp_path / "llava"),
                                      "--max-length", str(limit)])  # fmt: skip
        assert len(read_records(out)) == pieces


def test_bad_flags_are_one_clear_error(tmp_path):
    write_records(tmp_path / "in.json", [GOOD])
    path = str(tmp_path / "in.json")
    for flags, message in (
        (["--fix", path], "another name"),
        (["--tokenizer", str(tmp_path), "--template", "nonsense"], "nonsense"),
        (["--image-folder", "/no/such"], "not a folder"),
        (["--workers", "0"], "--workers 0"),
        (["--tokenizer", str(tmp_path), "--features-per-image", "0"], "--features-per-image 0: give 1 or more"),
        *(
            ([flag, value], f"{flag} is about lengths: give --tokenizer too")
            for flag, value in (("--template", "v1"), ("--image-tokens", "patch"), ("--features-per-image", "9"))
        ),
        (["--mm-use-im-start-end"], "--mm-use-im-start-end is about lengths: give --tokenizer too"),
    ):
        with pytest.raises(LlavaError, match=message):
            validate.main([path, *flags])


texts = st.one_of(st.text(max_size=8), st.just("<image>"), st.just("a <image>"), st.integers(), st.none(), st.just(" "))
entries = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "user", "system", None]), "value": texts})
any_record = st.fixed_dictionaries(
    {"id": st.text(max_size=3)},
    optional={
        "image": st.one_of(st.just("a.png"), st.just(""), st.none(), st.lists(st.just("b.png"), max_size=2)),
        "conversations": st.one_of(st.lists(entries, max_size=4), st.none(), st.text(max_size=3)),
        "conversatons": st.lists(entries, max_size=2),
    },
)
usual = st.builds(record, st.text(max_size=3), texts, texts, texts, texts)


@settings(deadline=None, max_examples=60)
@given(st.one_of(any_record, usual))
def test_the_quick_look_passes_nothing_that_the_close_one_finds(made):
    if _is_plainly_good(made):
        from llava.data import record_checks

        quick, record_checks._is_plainly_good = record_checks._is_plainly_good, lambda _: False
        try:
            assert check_form(made) == []
        finally:
            record_checks._is_plainly_good = quick


@settings(deadline=None, max_examples=60)
@given(any_record)
def test_repair_leaves_no_fault(made):
    from llava.data.record_checks import repair

    found = check_form(made)
    fixed = repair(made, found)
    if fixed is not None:
        assert not {finding.kind for finding in check_form(fixed)} & FAULTS.keys()
        assert json.dumps(fixed)
    else:
        assert {finding.kind for finding in found} & FAULTS.keys()


def test_what_a_record_says_is_shown_in_short(tmp_path, capsys, images):
    long = 5000 * "n"
    code, report = run(tmp_path, [record(long, "<image> q", "a", image=long + ".png")], "--image-folder", str(images))
    shown = capsys.readouterr().out
    assert code == 1 and "record 0 (id 'nnn" in shown and max(map(len, shown.splitlines())) < 600
    (case,) = report["faults"]["image_missing"]["first"]
    assert case["id"] == long and case["detail"] == long + ".png", "the report has it whole"


def test_filter_missing(tmp_path, images, capsys):
    inside = record("inside", "<image>", "a", image="data:image/png;base64,eA==")
    records = [GOOD, record("gone", "<image>", "a", image="none.png"), record("text", "q", "a", image=None), inside]
    write_records(tmp_path / "in.json", records)
    flags = [str(tmp_path / "in.json"), "--image-folder", str(images), "--output", str(tmp_path / "out.jsonl")]
    filter_missing.main([*flags, "--missing-list", str(tmp_path / "missing.json")])
    assert [row["id"] for row in read_records(tmp_path / "out.jsonl")] == ["good", "text", "inside"]
    assert read_json(tmp_path / "missing.json") == ["none.png"]
    assert "3 of 4 records (1 of text alone)" in capsys.readouterr().out
    write_records(tmp_path / "in.json", [*records, CASES["image_other_form"]])
    filter_missing.main([*flags, "--overwrite"])
    assert "; 1 of them is there under a name in another Unicode form (NFC, NFD)" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    write_records(tmp_path / "in.json", [GOOD])
    flags[2] = str(tmp_path / "empty")
    with pytest.raises(LlavaError, match="is it the right folder"):
        filter_missing.main([*flags[:4], str(tmp_path / "out2.jsonl")])
    write_records(tmp_path / "in.json", [])
    with pytest.raises(LlavaError, match=r"in\.json: there are no records in it"):
        filter_missing.main([*flags[:4], str(tmp_path / "out2.jsonl")])
    assert not (tmp_path / "out2.jsonl").exists()


def split(tmp_path, records, *flags):
    make_tokenizer(tmp_path / "llm")
    write_records(tmp_path / "in.json", records)
    split_long_conversation.main(["--in-file", str(tmp_path / "in.json"), "--out-file", str(tmp_path / "out.json"),
                                  "--model-name-or-path", str(tmp_path / "llm"), "--features-per-image", "16",
                                  *flags])  # fmt: skip
    return read_records(tmp_path / "out.json")


def test_split_long_conversations(tmp_path):
    from llava.data.sample_form import form_of
    from llava.model.tokenizer import load_tokenizer
    from llava.tokenization import encode_conversation

    long = record("long", "<image>\nq0", "a0 " * 60, "q1", "a1 " * 60, "q2", "a2 " * 60, "q3", "a3")
    pieces = split(tmp_path, [GOOD, long], "--max-length", "450", "--template", "v1")
    tokenizer = load_tokenizer(tmp_path / "llm")
    assert pieces[0] == GOOD
    assert len(pieces) > 2 and pieces[1]["id"] == "long_0"
    said = [turn["value"].replace("<image>", "").strip() for piece in pieces[1:] for turn in piece["conversations"]]
    assert said == [turn["value"].replace("<image>", "").strip() for turn in long["conversations"]]
    for piece in pieces:
        assert check_form(piece) == [], "each piece is a good record with its image"
        assert len(encode_conversation(piece, "v1", tokenizer, features_per_image=16).input_ids) <= 450
    assert form_of(tmp_path / "llm").template == "v0", "as training from a folder that names none"


def test_split_takes_a_range_and_counts_what_is_too_long(tmp_path, capsys):
    records = [record(str(n), "<image> q", "word " * 200) for n in range(5)]
    pieces = split(tmp_path, records, "--max-length", "100", "--begin", "1", "--end", "3")
    assert [piece["id"] for piece in pieces] == ["1", "2"]
    assert "pieces of one question and answer longer than 100 positions: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-length", "0"), "--max-length 0: give 1 or more"),
        (("--features-per-image", "0"), "--features-per-image 0: give 1 or more"),
        (("--begin", "1"), "holds no record number 1"),
    ],
)
def test_a_split_that_cannot_be_writes_nothing(tmp_path, flags, message):
    with pytest.raises(LlavaError, match=message):
        split(tmp_path, [GOOD], *flags)
    assert not (tmp_path / "out.json").exists()


def test_pieces_of_records_without_an_id_are_told_apart_by_their_number(tmp_path):
    long = record(None, "q0", "a0 " * 60, "q1", "a1 " * 60)
    short = record(None, "q", "a")
    nameless = {key: value for key, value in long.items() if key != "id"}
    pieces = split(tmp_path, [short, short, long, nameless], "--max-length", "250", "--begin", "1")
    expected = [None, "record2_0", "record2_2", "record3_0", "record3_2"]
    assert [piece["id"] for piece in pieces] == expected


def test_split_goes_by_who_speaks(tmp_path):
    """A greeting of the assistant stays with the first piece, a system turn goes with each; no answer is lost."""
    plain = record("long", "<image>\nq0", "a0 " * 60, "q1", "a1 " * 60, "q2", "a2 " * 60)["conversations"]
    opening = [{"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "Hello."}]
    made = {"id": "long", "images": ["a.png"], "messages": [*opening, *plain]}
    pieces = split(tmp_path, [made], "--max-length", "250")
    assert [piece["id"] for piece in pieces] == ["long_0", "long_4", "long_6"]
    for number, piece in enumerate(pieces):
        spoken = piece["conversations"]
        assert spoken[0] == opening[0] and (spoken[1] == opening[1]) == (number == 0)
        assert spoken[-1] == {"from": "gpt", "value": plain[2 * number + 1]["value"]}
        assert spoken[-2]["from"] == "human" and spoken[-2]["value"].startswith("<image>\n")
        assert spoken[-2]["value"].endswith(f"q{number}") and "messages" not in piece


def test_records_of_other_keys_are_checked_and_put_right(tmp_path, images):
    made = {
        "id": "m",
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": 4}],
    }
    code, report = run(tmp_path, [made], "--image-folder", str(images), "--fix", str(tmp_path / "fixed.json"))
    assert (
        code == 1
        and report["faults"].keys() == {"image_count"}
        and report["notes"].keys() == {"number_as_text", "other_names"}
    )
    fixed = [{"id": "m", "images": ["a.png"], "conversations": turns("q\n<image>", "4")}]
    assert read_records(tmp_path / "fixed.json") == fixed
    gone = {**made, "images": ["a.png", "none.png"]}
    write_records(tmp_path / "in.json", [made, gone])
    filter_missing.main(
        [str(tmp_path / "in.json"), "--image-folder", str(images), "--output", str(tmp_path / "o.json")]
    )
    assert read_records(tmp_path / "o.json") == [made]


def test_a_lone_surrogate_stops_no_command(tmp_path, images, caplog):
    path = tmp_path / "half.json"
    path.write_text(json.dumps([record("a", "<image>\nq", "fine \ud83d")]))
    assert validate.main([str(path), "--fix", str(tmp_path / "fixed.jsonl")]) == 0
    assert read_records(tmp_path / "fixed.jsonl")[0]["conversations"][1]["value"] == "fine \ufffd"
    filter_missing.main([str(path), "--image-folder", str(images), "--output", str(tmp_path / "out.parquet")])
    assert read_records(tmp_path / "out.parquet")[0]["conversations"][1]["value"] == "fine \ufffd"
    assert "1 text held half of a character pair (first: record 0)" in caplog.text
