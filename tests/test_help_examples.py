"""The example of each command's help runs as it is written, on small stand-ins that lie under the names it uses.

What serves, trains, downloads, is paid for or takes minutes isn't run here: `ELSEWHERE` names the test that does.
"""

import importlib
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from llava.eval import run_eval
from llava.manifests import write_manifest
from llava.model.convert.delta import make_delta
from llava.model.convert.hf_writer import export_hf
from llava.records import write_json, write_records
from tests.documented_commands import ROOT, module_and_flags
from tests.test_commands import command_modules, parser_of, parsers
from tests.tiny import make_llava

NEEDS = {
    "llava.data.audit": "train.json test.json images",
    "llava.data.convert": "table.csv images",
    "llava.data.filter_missing": "train.json images",
    "llava.data.phantoms": "",
    "llava.data.split_long_conversation": "train.json LLM",
    "llava.data.stats": "instruct.json",
    "llava.data.validate": "train.json images LLM",
    "llava.eval.baselines": "train.json test.json",
    "llava.eval.model_vqa": "CHECKPOINT questions.jsonl images",
    "llava.eval.model_vqa_med": "CHECKPOINT test.json images",
    "llava.eval.paper_table": "scores.json",
    "llava.eval.report": "test.json answers.jsonl answers.jsonl:answers-blank.jsonl",
    "llava.eval.run_eval": "test.json answers.jsonl",
    "llava.eval.run_eval_batch": "runs test.json",
    "llava.eval.run_llava": "CHECKPOINT scan.png",
    "llava.eval.summarize_gpt_review": "judged.jsonl:scores.jsonl judged.jsonl:other.jsonl",
    "llava.images.convert": "hospital",
    "llava.images.info": "scan.dcm volume.nii.gz",
    "llava.model.apply_delta": "LLM:LLAMA DELTA",
    "llava.model.average": "CHECKPOINT CHECKPOINT:OTHER",
    "llava.model.consolidate": "CHECKPOINT",
    "llava.model.export_gguf": "CHECKPOINT",
    "llava.model.export_hf": "CHECKPOINT",
    "llava.model.extract_mm_projector": "CHECKPOINT",
    "llava.model.import_hf": "HF_CHECKPOINT",
    "llava.model.make_delta": "LLM:LLAMA CHECKPOINT:MODEL",
    "llava.model.quantize": "CHECKPOINT",
}
"""What the example of each command finds, as `there` or `what:under which name`."""
EXTRAS = {
    "llava.images.convert": ["pydicom"],
    "llava.images.info": ["pydicom", "nibabel"],
    "llava.model.export_gguf": ["gguf"],
    "llava.model.quantize": ["bitsandbytes"],
}
SMALLER = {"llava.data.phantoms": {"500": "5", "50": "3", "100": "4"}}
"""Numbers that a machine of tests has no time for."""
ELSEWHERE = {
    "llava.data.download_images": "data/test_download_images.py",
    "llava.demo": "e2e/test_demo.py",
    "llava.demo.language_model": "e2e/test_demo.py",
    "llava.demo.tokenizer": "e2e/test_demo.py",
    "llava.demo.tower": "e2e/test_demo.py",
    "llava.eval.eval_multimodal_chat_gpt_score": "eval/test_judge.py",
    "llava.eval.run_med_datasets_eval_batch": "drop_in/test_seed_commands.py",
    "llava.instruct.instruct_generate": "instruct/test_instruct_chain.py",
    "llava.instruct.instruct_postprocess": "instruct/test_instruct_chain.py",
    "llava.model.import_gguf": "model/test_gguf.py",
    "llava.model.merge_lora": "model/test_merge_lora.py",
    "llava.serve": "serve/test_serve_command.py",
    "llava.serve.cli": "serve/test_cli.py",
    "llava.serve.controller": "serve/test_controller.py",
    "llava.serve.gradio_web_server": "serve/test_web_server.py",
    "llava.serve.model_worker": "serve/test_engine_worker.py",
    "llava.serve.openai_api_server": "serve/test_openai_api.py",
    "llava.serve.register_worker": "serve/test_controller.py",
    "llava.serve.test_message": "drop_in/test_seed_commands.py",
    "llava.train.estimate_memory": "train/test_dry_run_inputs.py",
    "llava.train.train": "train/test_scripts.py",
    "llava.train.train_mem": "drop_in/test_seed_commands.py",
}
"""The test that runs the command."""


def test_every_command_is_run_here_or_elsewhere():
    assert sorted({*NEEDS, *ELSEWHERE}) == sorted({*command_modules()} - {"llava"})
    assert not {*NEEDS} & {*ELSEWHERE}
    assert [name for name in ELSEWHERE.values() if not (ROOT / "tests" / name).is_file()] == []


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with everything that an example reads."""
    folder = tmp_path_factory.mktemp("stand-ins")
    (folder / "CHECKPOINT").symlink_to(make_llava(folder / "made"))
    (folder / "LLM").symlink_to(folder / "made" / "llm")
    make_delta(folder / "LLM", folder / "CHECKPOINT", folder / "DELTA")
    export_hf(folder / "CHECKPOINT", folder / "HF_CHECKPOINT")
    (folder / "images").mkdir()
    for name, colour in (("a", "red"), ("b", "grey")):
        Image.new("RGB", (40, 30), colour).save(folder / "images" / f"{name}.png")
    (folder / "scan.png").symlink_to(folder / "images" / "a.png")
    train, test = [], []
    for number in range(8):
        image, kind = "ab"[number % 2] + ".png", ("OPEN", "CLOSED")[number // 2 % 2]
        answer = "left lung" if kind == "OPEN" else ("yes", "no")[number % 2]
        turns = [{"from": "human", "value": f"<image>\nWhat of {number}?"}, {"from": "gpt", "value": answer}]
        record = {"id": f"q{number}", "image": image, "conversations": turns, "answer_type": kind}
        (train if number < 4 else test).append(record)
    write_json(folder / "train.json", train)
    write_json(folder / "instruct.json", train)
    write_json(folder / "test.json", test)
    write_records(folder / "questions.jsonl", [{"question_id": n, "image": "a.png", "text": "What?"} for n in (1, 2)])
    (folder / "table.csv").write_text("image,question,answer\na.png,Is it red?,yes\nb.png,Which colour?,grey\n")
    answers = [{"question_id": record["id"], "text": "yes"} for record in test]
    (folder / "runs" / "vqa_rad").mkdir(parents=True)
    for path in (folder / "answers.jsonl", folder / "runs" / "vqa_rad" / "test-answer-file.jsonl"):
        write_records(path, answers)
        write_manifest(path, questions=str(folder / "test.json"))
    run_eval.main(["--pred", str(folder / "answers.jsonl"), "--gt", str(folder / "test.json"),
                   "--output", str(folder / "scores.json")])  # fmt: skip
    judged = [{"question_id": n, "type": "conversation", "gpt_eval": "8 6\nx"} for n in range(3)]
    write_records(folder / "judged.jsonl", judged)
    _scans(folder)
    return folder


def _scans(folder: Path) -> None:
    """Where the packages for them are installed; their tests are skipped otherwise."""
    try:
        import nibabel
        import numpy as np
        from pydicom.data import get_testdata_file
    except ImportError:
        return
    (folder / "scan.dcm").symlink_to(get_testdata_file("CT_small.dcm"))
    (folder / "hospital").mkdir()
    shutil.copy(get_testdata_file("CT_small.dcm"), folder / "hospital" / "1.dcm")  # links are left out
    nibabel.save(nibabel.Nifti1Image(np.arange(1000, dtype="int16").reshape(10, 10, 10), np.eye(4)),
                 folder / "volume.nii.gz")  # fmt: skip


def examples(module: str) -> list[str]:
    return [one.epilog.removeprefix("example:\n").strip() for one in parsers(parser_of(module)) if one.epilog]


@pytest.mark.parametrize("module", NEEDS)
def test_the_example_of_the_help_runs(module, stand_ins, tmp_path, monkeypatch):
    for package in EXTRAS.get(module, []):
        pytest.importorskip(package, reason=f"{package} isn't installed")
    monkeypatch.chdir(tmp_path)
    for need in NEEDS[module].split():
        what, _, name = need.partition(":")
        for end in ("", ".manifest.json"):
            if (stand_ins / (what + end)).exists():
                (tmp_path / ((name or what) + end)).symlink_to(stand_ins / (what + end))
    before = {path.name for path in tmp_path.iterdir()}
    example = examples(module)[0]
    found, flags = module_and_flags(shlex.split(example.replace("\\\n", " ")))
    assert found == module
    flags = [SMALLER.get(module, {}).get(word, word) for word in flags]
    flags = [word.replace("/data/hospital", "hospital") for word in flags]
    package = (ROOT / module.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    assert main(flags) in (0, None)
    written = {flags[place + 1] for place, word in enumerate(flags) if word in WRITTEN} - before
    assert [name for name in written if not (tmp_path / name).exists()] == []


WRITTEN = ("--output", "--output-dir", "--fix", "--out-file", "--answers-file", "--target-model-path", "--delta-path",
           "--dst", "--save-model-path", "--save")  # fmt: skip
