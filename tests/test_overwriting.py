"""What is there already is never replaced by something else unless `--overwrite` says so: every command that writes."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.folders import stage_files
from llava.manifests import claim, fingerprint_of, finished, give_up, write_manifest
from llava.records import read_records, write_json, write_records
from tests.openai_server import OpenAIServer
from tests.test_flags import command_modules, flags_of_command

WRITES = {
    "save",
    "report",
    "fix",
    "clean-train",
    "per-item",
    "json",
    "target",
    "summary",
    "missing-list",
    "answers-file",
}
WRITES |= {"scores-file", "out-file", "dst", "delta", "output", "output-dir", "output-path", "write-urls"}
OTHERWISE = {
    "llava.train.train": "refuses a run of other flags: --overwrite_output_dir (tests/train/test_one_run.py)",
    "llava.train.train_mem": "as llava.train.train",
}


@pytest.mark.parametrize("module", command_modules())
def test_every_command_that_writes_has_the_flag(module):
    names = set().union(*flags_of_command(module))
    if module not in OTHERWISE and names & WRITES:
        assert "overwrite" in names, f"{module} writes {sorted(names & WRITES)}"


RECORDS = [
    {"id": n, "image": "a.png", "answer_type": "CLOSED", "conversations": [
        {"from": "human", "value": f"Is {n} there?\n<image>"}, {"from": "gpt", "value": "yes"}]}
    for n in range(6)
]  # fmt: skip
VERDICT = {"judgement": "1", "question_id": 1, "type": "detail", "domain": {"mri": True}, "scores": [8, 4]}
CELLS = {"open": 179, "closed": 272, "paper": {"recall": {"value": 64.0}, "yes/no accuracy": {"value": 50.0}}}

PHANTOMS = "--train 2 --test 2 --conversations 1 --vqa 1 --text 2 --output-dir {out}"
REPORT = "--gt {here}/r.json --pred {here}/a.jsonl --bootstrap-samples 50 --output {out}.html"
SUMMARY = "--input_path {here}/g.jsonl --output_path {here}/p.json --summary {out}.json"
CHEAP = [
    ("llava.data.validate", "{here}/r.json --fix {out}.json", "out.json"),
    ("llava.data.validate", "{here}/r.json --report {out}.json", "out.json"),
    ("llava.data.filter_missing", "{here}/r.json --image-folder {here} --output {out}.json", "out.json"),
    ("llava.data.audit", "--train {here}/r.json --test {here}/r.json --output {out}.json", "out.json"),
    ("llava.data.audit", "--train {here}/r.json --test {here}/t.json --clean-train {out}.json", "out.json"),
    ("llava.data.stats", "{here}/r.json --output-dir {out}", "out/stats.json"),
    ("llava.data.convert", "csv --input {here}/t.csv --output-dir {out}", "out/train.json"),
    ("llava.data.phantoms.__main__", PHANTOMS, "out/phantoms.json"),
    ("llava.images.info", "{here}/a.png --json {out}.json", "out.json"),
    ("llava.images.info", "{here}/a.png --save {out}.png", "out.png"),
    ("llava.instruct.instruct_postprocess", "--input_path {here}/g.jsonl --output_path {out}.json", "out.json"),
    ("llava.instruct.instruct_postprocess", SUMMARY, "out.json"),
    ("llava.eval.baselines", "--train {here}/r.json --test {here}/t.json --output-dir {out}", "out/commonest.jsonl"),
    ("llava.eval.run_eval", "--gt {here}/r.json --pred {here}/a.jsonl --output {out}.json", "out.json"),
    ("llava.eval.run_eval", "--gt {here}/r.json --pred {here}/a.jsonl --per-item {out}.jsonl", "out.jsonl"),
    ("llava.eval.run_eval_batch", "--gt {here}/r.json --pred {here}/a.jsonl --output {out}.jsonl", "out.jsonl"),
    ("llava.eval.report", REPORT, "out.html"),
    ("llava.eval.report", REPORT, "out.md"),
    ("llava.eval.paper_table", "--results fine-tuned:vqa-rad={here}/c.json --output {out}.md", "out.md"),
    ("llava.eval.summarize_gpt_review", "--scores-file {here}/j.jsonl --json {out}.json", "out.json"),
]  # fmt: skip


ITSELF = [
    ("llava.data.validate", "{r} --report {r}"),
    ("llava.data.validate", "{r} --fix {out} --report {out}"),
    ("llava.data.filter_missing", "{r} --image-folder {here} --output {out} --missing-list {out}"),
    ("llava.data.audit", "--train {r} --test {r} --output {r}"),
    ("llava.data.audit", "--train {r} --test {r} --clean-train {r}"),
    ("llava.data.split_long_conversation", "--in-file {r} --out-file {r} --model-name-or-path {here}"),
    ("llava.instruct.instruct_postprocess", "--input_path {here}/g.jsonl --output_path {here}/g.jsonl"),
    ("llava.instruct.instruct_postprocess", "--input_path {here}/g.jsonl --output_path {out} --summary {out}"),
    ("llava.instruct.instruct_generate", "--input_path {r} --output_path {r}"),
    ("llava.images.info", "{here}/a.png --save {here}/a.png"),
    ("llava.images.info", "{here}/a.png --save {out} --json {out}"),
    ("llava.eval.model_vqa_med", "--model-path {here} --question-file {r} --answers-file {r}"),
    ("llava.eval.model_vqa", "--model-path {here} --question-file {r} --answers-file {r}"),
    ("llava.eval.run_med_datasets_eval_batch", "--model-path {here} --question-file {r} --answers-file {r}"),
    ("llava.eval.run_eval", "--gt {r} --pred {here}/a.jsonl --output {here}/a.jsonl"),
    ("llava.eval.run_eval", "--gt {r} --pred {here}/a.jsonl --output {out} --per-item {out}"),
    ("llava.eval.run_eval_batch", "--gt {r} --pred {here}/a.jsonl --output {here}/a.jsonl"),
    ("llava.eval.report", "--gt {r} --pred m={here}/a.jsonl --output {r}"),
    ("llava.eval.paper_table", "--results fine-tuned:vqa-rad={here}/c.json --output {here}/c.json"),
    ("llava.eval.summarize_gpt_review", "--scores-file {here}/j.jsonl --json {here}/j.jsonl"),
    ("llava.eval.eval_multimodal_chat_gpt_score", "--question-file {r} --answers-file {r} --scores-file {r}"),
]


@pytest.mark.parametrize(("module", "words"), ITSELF)
def test_no_command_replaces_what_it_reads(module, words, here, tmp_path):
    """Not even with --overwrite, which was enough to put a report in the place of the records."""
    before = {path: path.read_bytes() for path in here.glob("*.*")}
    argv = words.format(r=here / "r.json", here=here, out=tmp_path / "out.json").split()
    with pytest.raises(LlavaError, match="it is read, or written by another flag; give another name"):
        importlib.import_module(module).main([*argv, "--overwrite"])
    assert {path: path.read_bytes() for path in here.glob("*.*")} == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    Image.new("RGB", (30, 20), (200, 10, 10)).save(folder / "a.png")
    write_json(folder / "r.json", RECORDS)
    write_json(folder / "t.json", [{**one, "image": "b.png"} for one in RECORDS])
    (folder / "t.csv").write_text("image,question,answer,split\na.png,What?,lung,train\n")
    row = {"pair_id": "f1", "image": "a.png", "result": "User: What is it?\nAssistant: A lung.", "refused": None}
    write_records(folder / "g.jsonl", [row])
    write_records(folder / "a.jsonl", [{"question_id": n, "text": "yes"} for n in range(6)])
    write_json(folder / "c.json", CELLS)
    row = VERDICT | {"question": "q", "answer": "a", "model_id": "m", "gpt_eval": "8 4"}
    write_records(folder / "j.jsonl", [row])
    write_json(folder / "lora" / "adapter_config.json", {})
    return folder


@pytest.mark.parametrize(("module", "words", "output"), CHEAP, ids=[f"{row[0]}-{row[2]}" for row in CHEAP])
def test_other_content_is_replaced_only_when_told_to(module, words, output, here, tmp_path, capsys):
    command = importlib.import_module(module).main
    argv = words.format(here=here, out=tmp_path / "out").split()
    file = tmp_path / output
    command(argv)
    first = file.read_bytes()
    command(argv)  # the same again
    assert file.read_bytes() == first
    mine = b'{"pred": "mine", "seed": 17}\n' if file.suffix != ".png" else b"mine"
    file.write_bytes(mine)
    refused = ""
    try:
        code = command(argv)
    except LlavaError as error:
        code, refused = 2, str(error)
    assert code == 2 and "--overwrite to replace" in refused + capsys.readouterr().err
    assert file.read_bytes() == mine
    command([*argv, "--overwrite"])
    assert file.read_bytes() == first
    assert not list(tmp_path.rglob(".*.part"))


AUDIT = "--train {here}/r.json --test {here}/t.json --output {out}.json --clean-train {out}.jsonl"
TWO = [
    ("llava.data.validate", "{here}/r.json --fix {out}.jsonl --report {out}.json"),
    ("llava.data.filter_missing", "{here}/r.json --image-folder {here} --output {out}.jsonl --missing-list {out}.json"),
    ("llava.data.audit", AUDIT),
    ("llava.instruct.instruct_postprocess", SUMMARY.replace("{here}/p.json", "{out}.jsonl")),
    ("llava.eval.run_eval", "--gt {here}/r.json --pred {here}/a.jsonl --output {out}.json --per-item {out}.jsonl"),
    ("llava.eval.report", REPORT),
]


@pytest.mark.parametrize(("module", "words"), TWO, ids=[row[0] for row in TWO])
def test_where_one_output_is_refused_none_is_written(module, words, here, tmp_path):
    command = importlib.import_module(module).main
    argv = words.format(here=here, out=tmp_path / "out").split()
    command(argv)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    for kept in files:
        for file in files:
            file.unlink(missing_ok=True)
        kept.write_bytes(b"mine")
        with pytest.raises(LlavaError, match="--overwrite to replace"):
            command(argv)
        assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(kept, b"mine")]


def test_no_image_is_saved_where_the_file_about_it_is_refused(here, tmp_path):
    from llava.images import info

    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(LlavaError, match="--overwrite to replace"):
        info.main([f"{here}/a.png", "--save", f"{tmp_path}/a.png", "--json", f"{tmp_path}/a.json"])
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "mine")]


FOLDERS = {
    "llava.model.apply_delta": "--base {here} --delta {here} --target {out}",
    "llava.model.make_delta": "--base {here} --target {here} --delta {out}",
    "llava.model.merge_lora": "--model-path {here}/lora --model-base {here} --save-model-path {out}",
    "llava.model.consolidate": "--src {here} --dst {out}",
    "llava.model.average": "--models {here} {here} --output {out}",
    "llava.model.quantize": "--model-path {here} --output {out}",
    "llava.model.export_hf": "--model-path {here} --output {out}",
    "llava.model.import_hf": "--model-path {here} --output {out}",
    "llava.model.export_gguf": "--model-path {here} --output {out}",
    "llava.model.import_gguf": "--model-path {here}/r.json --output {out}",
    "llava.images.convert": "{here} --output-dir {out}",
    "llava.demo.tower": "--data-path {here}/r.json --image-folder {here} --language-model {here} --output-dir {out}",
    "llava.demo.language_model": "--data-path {here}/r.json --tokenizer {here} --output-dir {out}",
    "llava.demo.tokenizer": "--data-path {here}/r.json --output-dir {out}",
}


@pytest.mark.parametrize("module", FOLDERS)
def test_a_folder_with_something_in_it_is_refused_at_once(module, here, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    argv = FOLDERS[module].format(here=here, out=tmp_path / "out").split()
    with pytest.raises(LlavaError, match="isn't empty; give another one, or --overwrite"):
        importlib.import_module(module).main(argv)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_projector_is_not_replaced(here, tmp_path):
    from llava.model import extract_mm_projector

    (tmp_path / "p.bin").write_text("mine")
    with pytest.raises(LlavaError, match="--overwrite to replace it"):
        extract_mm_projector.main(["--model-path", str(here), "--output", str(tmp_path / "p.bin")])
    assert (tmp_path / "p.bin").read_text() == "mine"


def test_scores_of_other_answers_stay_and_those_of_the_same_are_renewed(here, tmp_path):
    from llava.eval import run_eval_batch

    answers = tmp_path / "answers"
    for name in ("a", "b"):
        write_records(answers / f"{name}.jsonl", read_records(here / "a.jsonl"))
    out = tmp_path / "results.jsonl"
    words = ["--gt", str(here / "r.json"), "--output", str(out), "--bootstrap-samples", "0"]
    run_eval_batch.main([*words, "--pred_file_parent_path", str(answers)])
    write_records(answers / "a.jsonl", [{"question_id": n, "text": "no"} for n in range(6)])
    run_eval_batch.main([*words, "--pred_file_parent_path", str(answers)])
    assert [row["strict"]["closed accuracy"]["value"] for row in read_records(out)] == [0.0, 100.0]
    with pytest.raises(LlavaError, match="--overwrite"):
        run_eval_batch.main([*words, "--pred", str(answers / "a.jsonl")])
    assert len(read_records(out)) == 2


Asking = tuple[str, Callable[[Path], list[str]], str]


def judging(folder: Path) -> list[str]:
    return ["--question-file", f"{folder}/q.jsonl", "--answers-file", f"{folder}/a.jsonl", "--scores-file"]


def generating(folder: Path) -> list[str]:
    return ["--input_path", f"{folder}/f.jsonl", "--output_path"]


ASKING: list[Asking] = [
    ("llava.eval.eval_multimodal_chat_gpt_score", judging, "judge"),
    ("llava.instruct.instruct_generate", generating, "dialogue"),
]


@pytest.mark.parametrize(("module", "words", "mode"), ASKING, ids=[row[0] for row in ASKING])
def test_what_was_paid_for_is_asked_once_and_kept(module, words, mode, tmp_path, capsys):
    question = {"text": "Where?", "gpt4_answer": "A scan.", "fig_caption": "CT.", "type": "detail", "fig_label": "1"}
    write_records(
        tmp_path / "q.jsonl",
        [{**question, "question_id": n, "in_text_mention": [], "domain": {"ct_scan": True}} for n in range(3)],
    )
    write_records(tmp_path / "a.jsonl", [{"question_id": n, "text": f"{n}.", "model_id": "m"} for n in range(3)])
    write_records(tmp_path / "f.jsonl", [{"id": f"f{n}", "caption": f"Caption {n}."} for n in range(3)])
    out, command = tmp_path / "out.jsonl", importlib.import_module(module).main
    with OpenAIServer("--mode", mode) as server:
        argv = [*words(tmp_path), str(out), "--api-base", server.url, "--api-model"]
        assert not command([*argv, "m"])
        first, asked = out.read_bytes(), sum(server.stats()["requests"].values())
        assert not command([*argv, "m"])
        assert "complete already" in capsys.readouterr().out
        with pytest.raises(LlavaError, match=r"complete and of another run \(different: (judge_)?model\)"):
            command([*argv, "other"])
        assert out.read_bytes() == first and sum(server.stats()["requests"].values()) == asked
        assert not command([*argv, "other", "--overwrite"])
        assert sum(server.stats()["requests"].values()) == 2 * asked
        # A run that was cut goes on only with what it was begun with.
        out.rename(tmp_path / "out.jsonl.part")
        claim_of = tmp_path / "out.jsonl.part.json"
        write_json(claim_of, {"fingerprint": "x", "settings": {}})
        with pytest.raises(LlavaError, match="holds what another run began"):
            command([*argv, "m"])


def test_claims(tmp_path):
    file, settings = tmp_path / "a.jsonl", {"model": "a", "seed": 1}
    claim(file, settings)
    file.write_text("1")
    write_manifest(file, **settings, fingerprint=fingerprint_of(settings))
    assert finished(file, "fingerprint", fingerprint_of(settings)) and not finished(file, "fingerprint", "x")
    with pytest.raises(LlavaError, match=r"of another run \(different: model\)"):
        claim(file, settings | {"model": "b"})
    file.write_text("2")
    assert not finished(file, "fingerprint", fingerprint_of(settings))
    with pytest.raises(LlavaError, match="was changed after it was written"):
        claim(file, settings)
    give_up(file)
    claim(file, settings)
    (tmp_path / "foreign").write_text("x")
    with pytest.raises(LlavaError, match="nothing says which settings"):
        claim(tmp_path / "foreign", settings)


def test_no_file_of_a_folder_is_replaced_where_one_differs(tmp_path):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(LlavaError, match="b is there"), stage_files(tmp_path, last="m", overwrite=False) as part:
        for name in "abm":
            (part / name).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
