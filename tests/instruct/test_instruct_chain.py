"""Captions → generation → training records, through the commands and a real server."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from llava.constants import FIGURE_DOMAINS
from llava.errors import LlavaError
from llava.instruct.figures import Figure, in_turn, read_figures
from llava.instruct.instruct_postprocess import summarise, to_training_record
from llava.instruct.prompts import build_messages
from llava.records import read_records, write_json
from tests.made_files import write
from tests.openai_server import OpenAIServer

FIGURES = {
    domain: [
        {
            "pair_id": f"{domain}_{n}",
            "fig_label": "Figure 1",
            "fig_caption": f"Caption {n} of {domain}.",
            "in_text_mention": ["A plain mention.", {"tokens": "A mention with tokens.", "entities": []}],
        }
        for n in range(4)
    ]
    for domain in FIGURE_DOMAINS
}


def command(module, *words, env=None):
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, env=env)
    return done


def test_figures_of_every_file_kind(tmp_path):
    write_json(tmp_path / "by_domain.json", FIGURES)
    figures = read_figures(tmp_path / "by_domain.json")
    assert len(figures) == 20
    assert figures[0].mentions == ("A plain mention.", "A mention with tokens.")
    rows = [{"id": "r1", "caption": "A scan.", "image": "r1.png"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert read_figures(tmp_path / "rows.jsonl") == [Figure(key="r1", caption="A scan.", image="r1.png")]
    record = {"id": "x", "image": "x.jpg", "conversations": [{"from": "human", "value": "q\n<image>"}]}
    record["conversations"].append({"from": "gpt", "value": "A caption."})
    write_json(tmp_path / "records.json", [record])
    assert read_figures(tmp_path / "records.json")[0].caption == "A caption."


def test_a_single_mention_is_one_sentence(tmp_path):
    row = {"pair_id": "a", "caption": "c", "fig_label": 3, "domain": 5}
    write_json(tmp_path / "f.json", {"mri": [{**row, "in_text_mention": "Figure 3 shows it."}]})
    (figure,) = read_figures(tmp_path / "f.json")
    assert (figure.mentions, figure.label, figure.domain) == (("Figure 3 shows it.",), "3", "mri")
    write_json(tmp_path / "one.json", {**row, "in_text_mention": 7})
    (figure,) = read_figures(tmp_path / "one.json")
    assert (figure.mentions, figure.domain) == ((), None)


def test_a_figure_of_two_domains_is_one(tmp_path):
    """The same file made records for stage 1, and was refused here."""
    pair = {"pair_id": "a", "fig_caption": "A scan."}
    write_json(tmp_path / "f.json", {"mri": [pair], "ct_scan": [pair, {**pair, "pair_id": "b"}]})
    figures = read_figures(tmp_path / "f.json")
    assert [(figure.key, figure.domains) for figure in figures] == [("a", ("mri", "ct_scan")), ("b", ("ct_scan",))]
    for other in ({"mri": [pair, pair]}, {"mri": [pair], "ct_scan": [{**pair, "fig_caption": "Another."}]}):
        write_json(tmp_path / "f.json", other)
        with pytest.raises(LlavaError, match="id 'a' stands there twice"):
            read_figures(tmp_path / "f.json")


def test_figures_without_a_caption_are_left_out_and_counted(tmp_path, caplog):
    write_json(tmp_path / "f.json", [{"id": "a", "caption": " "}, {"id": "b", "caption": "c"}, {"id": "d"}])
    assert [figure.key for figure in read_figures(tmp_path / "f.json")] == ["b"]
    assert "2 figures without a caption are left out (first: " in caplog.text and "record 0)" in caplog.text


def test_a_fault_in_captions_by_domain_is_named_by_its_line(tmp_path):
    """All of the file was read, and its first line was said to be at fault."""
    path = tmp_path / "f.json"
    text = json.dumps(FIGURES, indent=1)
    path.write_text(text.replace('"Caption 3 of mri."', '"Caption 3 of mri.'))
    line = text.splitlines().index('   "fig_caption": "Caption 3 of mri.",') + 1
    with pytest.raises(LlavaError, match=rf"f\.json: not JSON \(.*: line {line} "):
        read_figures(path)


def test_captions_in_lines_need_no_name_of_lines(tmp_path, monkeypatch):
    rows = [{"pair_id": str(number), "caption": "A scan."} for number in range(3)]
    path = tmp_path / "f.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("llava.data.caption_files.read_json", lambda path: pytest.fail("read whole"))
    assert len(read_figures(path)) == 3
    path.write_text(json.dumps({"mri": rows}))
    assert {figure.domain for figure in read_figures(path)} == {"mri"}


@pytest.mark.parametrize(
    "rows", [[{"id": "a"}], [{"id": "a", "caption": "c"}, {"id": "a", "caption": "d"}], [], {"mri": [3]}]
)
def test_bad_figure_files(tmp_path, rows):
    write_json(tmp_path / "bad.json", rows)
    with pytest.raises(LlavaError, match=r"bad\.json"):
        read_figures(tmp_path / "bad.json")


def test_domains_are_taken_in_turn_and_seeded(tmp_path):
    write_json(tmp_path / "f.json", FIGURES)
    figures = read_figures(tmp_path / "f.json")
    taken = in_turn(figures, 10, seed=1)
    assert Counter(figure.domain for figure in taken) == dict.fromkeys(FIGURE_DOMAINS, 2)
    assert taken == in_turn(figures[::-1], 10, seed=1), "the order of the file must not matter"
    assert taken != in_turn(figures, 10, seed=2)
    assert len(in_turn(figures, None, 0)) == 20


def test_mentions_only_where_asked_for():
    figure = Figure(key="k", caption="C.", mentions=("M one.",))
    with_mentions, without = (build_messages(figure, flag)[-1]["content"] for flag in (True, False))
    assert "M one." in with_mentions
    assert "M one." not in without


def test_image_side_is_drawn_by_id():
    row = {"result": "User: A?\nAssistant: B."}
    sides = [
        to_training_record({**row, "pair_id": f"p{n}"}, 0, Counter(), "x")["conversations"][0]["value"]
        for n in range(200)
    ]
    assert set(sides) == {"<image>\nA?", "A?\n<image>"}
    assert 60 < sides.count("<image>\nA?") < 140


def test_chain_through_the_commands(tmp_path):
    write_json(tmp_path / "figures.json", FIGURES)
    generated, final = tmp_path / "generated.jsonl", tmp_path / "instruct.json"
    with OpenAIServer("--mode", "dialogue", "--faults", "0.2", "--kinds", "429,500,cut") as server:
        words = ["--input_path", str(tmp_path / "figures.json"), "--output_path", str(generated), "--max_size", "12"]
        words += ["--api-base", server.url, "--api-model", "m", "--use_inline_mentions", "True"]
        dry = command("llava.instruct.instruct_generate", *words, "--dry-run")
        assert "Caption" in dry.stdout
        assert sum(server.stats()["requests"].values()) == 0
        done = command("llava.instruct.instruct_generate", *words)
        assert done.returncode == 0, done.stderr
        requests = server.stats()["requests"]
    assert len(requests) == 12
    assert {row["finish_reason"] for row in read_records(generated)} == {"stop"}
    assert all("A plain mention." in text for text in requests)
    words = ["--input_path", str(generated), "--output_path", str(final), "--summary", str(tmp_path / "counts.json")]
    done = command("llava.instruct.instruct_postprocess", *words)
    assert done.returncode == 0, done.stderr
    assert "12" in (tmp_path / "counts.json").read_text()
    assert "12 dialogues with 24 turns" in done.stdout
    records = read_records(final)
    assert len(records) == 12
    assert sum(turn["value"].count("<image>") for record in records for turn in record["conversations"]) == 12
    assert {tuple(record["domain"]) for record in records} == {FIGURE_DOMAINS}


def test_an_answer_that_was_cut_off_is_left_out_and_counted():
    """It ended in the middle of a word, and was trained on."""
    counts, whole = Counter(), "User: A?\nAssistant: B.\nUser: C?\nAssistant: The left lu"
    row = {"pair_id": "p", "finish_reason": "length"}
    for text, turns in ((whole, 2), (whole + "ng.\nUser: An", 4), ("Assistant: B", 0)):
        record = to_training_record({**row, "result": text}, 0, counts, "row")
        assert len(record["conversations"] if record else []) == turns
    assert counts["cut_off"] == 1 and counts["turns_out"] == 3
    assert "cut off at --max-answer-tokens: 1" in summarise(counts)
    stopped = to_training_record({**row, "result": whole, "finish_reason": "stop"}, 0, counts, "row")
    assert len(stopped["conversations"]) == 4


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "g.jsonl").write_text(json.dumps({"pair_id": "a", "result": "no dialogue"}) + "\n")
    words = ["--input_path", str(tmp_path / "g.jsonl"), "--output_path", str(tmp_path / "o.json")]
    done = command("llava.instruct.instruct_postprocess", *words)
    assert done.returncode == 2
    assert not (tmp_path / "o.json").exists()


def test_a_caption_record_of_other_keys_is_a_figure(tmp_path):
    spoken = [{"role": "user", "content": "q\n<image>"}, {"role": "assistant", "content": "A caption."}]
    write_json(tmp_path / "r.json", [{"id": "x", "pair_id": None, "images": ["x.jpg"], "messages": spoken}])
    assert read_figures(tmp_path / "r.json") == [Figure(key="x", caption="A caption.", image="x.jpg")]


def test_answers_are_as_long_as_asked(tmp_path):
    write_json(tmp_path / "figures.json", FIGURES)
    words = ["--input_path", str(tmp_path / "figures.json"), "--output_path", str(tmp_path / "out.jsonl"), "--dry-run"]
    words += ["--api-model", "m", "--max_size", "2", "--price-in", "1", "--price-out", "1000"]
    costs = []
    for tokens in ("10", "1000"):
        done = command("llava.instruct.instruct_generate", *words, "--max-answer-tokens", tokens)
        assert done.returncode == 0, done.stderr
        costs.append(done.stdout)
    assert costs[0] != costs[1]


def test_generated_marks_and_lists_of_domains():
    from llava.data.record_checks import check_form
    from llava.instruct.instruct_postprocess import to_training_record

    counts = Counter()
    row = {"pair_id": "x", "domain": ["mri"], "result": "User: <image> What is it?\nAssistant: A lung."}
    made = to_training_record(row, 0, counts, "row")
    assert check_form(made) == [] and counts["image_marks"] == 1
    assert made["domain"]["mri"] is True


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max-size", "-1"), ("--max-size", "0"), ("--max-answer-tokens", "0"), ("--temperature", "nan")],
)
def test_numbers_that_cannot_be_are_named(tmp_path, flag, value):
    from llava.instruct.instruct_generate import main

    captions = write(tmp_path / "c.json", [{"pair_id": str(i), "fig_caption": "A scan."} for i in range(3)])
    flags = ["--api-model", "m", "--api-key", "k", "--api-base", "http://127.0.0.1:9/v1", "--dry-run"]
    with pytest.raises(LlavaError, match=f"{flag} is {value}; give"):
        main(["--input_path", captions, "--output_path", str(tmp_path / "o.jsonl"), flag, value, *flags])
