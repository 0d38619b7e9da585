"""The published READMEs' commands as they are written there, from a folder that looks like the repository's root.

Paths begin in that folder in place of the disk's root; models, data and the judge are small stand-ins. Nothing else
of a command is changed.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from llava.model.convert.delta import make_delta
from llava.records import read_records, write_json, write_records
from tests.documented_commands import ROOT
from tests.drop_in import seed_commands
from tests.openai_server import OpenAIServer
from tests.serve.processes import wait_until
from tests.tiny import hub_cache, make_llava
from tests.train.helpers import make_records

SEEDS = Path(os.environ.get("LLAVA_SHARED_DIR", ROOT.parent / "shared")) / "seeds"
pytestmark = pytest.mark.xdist_group("published commands")  # their ports are what they are
needs_seeds = pytest.mark.skipif(not SEEDS.is_dir(), reason=f"no published commands at {SEEDS}; set LLAVA_SHARED_DIR")
LINKS = ("llava", "scripts", "model_vqa.py", "summarize_gpt_review.py", "download_data.sh")
PORTS = {"llava.serve.controller": 10000, "llava.serve.model_worker": 40000, "llava.serve.gradio_web_server": 7860}
MODELS = ("checkpoints/llava-7b-v0", "checkpoints/LLaVA-7B-v0", "checkpoints/LLaVA-Med-7B")
MODELS += ("path/to/llama-med-vicuna-7b", "path/to/checkpoint_llava_med_instruct_60k_inline_mention")


def test_the_documents_table_is_that_of_the_tests():
    assert seed_commands.documented() == seed_commands.table(), "run python -m tests.drop_in.seed_commands"
    known = {name for name in globals() if name.startswith("test_")}
    for row in seed_commands.COMMANDS:
        if "::" in row.test:
            file, name = row.test.split("::")
            assert f"def {name}(" in (ROOT / file).read_text()
        else:
            assert row.test in known


@needs_seeds
def test_every_published_command_has_a_row():
    commands = seed_commands.commands_of(SEEDS)
    assert len(commands) > 15
    assert [command for command in commands if seed_commands.row_of(command) is None] == []
    assert {row.name for row in seed_commands.COMMANDS} == {seed_commands.row_of(one).name for one in commands}


class Clone:
    """A folder like the repository's root, and the commands that are run there."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in LINKS:
            (folder / name).symlink_to(ROOT / name)
        tiny = make_llava(folder / "tiny")
        for name in MODELS:
            shutil.copytree(tiny, folder / name)
        shutil.copytree(folder / "tiny" / "llm", folder / "path/to/llama-7b")
        cache = hub_cache(folder / "cache", {"openai/clip-vit-large-patch14": folder / "tiny" / "clip"})
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OPENAI_API_KEY": "none",
        }

    def path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def line(self, *words: str) -> str:
        """The shortest published command that has these words, its paths begun in this folder."""
        commands = seed_commands.commands_of(SEEDS)
        command = min((one for one in commands if all(word in one for word in words)), key=len)
        return re.sub(r"(?<![\w.:/])/(?=path/|output/|data/to/|huggingface\.co/)", f"{self.folder}/", command)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        line = self.line(*words)
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, (
            f"{line}\n{done.stderr[:3000]}\n…\n{done.stderr[-3000:]}"
        )
        return done

    def start(self, until: str, *words: str) -> subprocess.Popen:
        """A server, when it has said so."""
        log = self.path(f"{'-'.join(words)}.log".replace(" ", "-"))
        wait_until(lambda: can_listen(PORTS[words[0]]), 90)
        with log.open("wb") as file:
            line = f"exec {self.line(*words)}"
            process = subprocess.Popen(
                ["sh", "-c", line], cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        process.log = log
        end = time.monotonic() + 120
        while until not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        return process


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    if not SEEDS.is_dir():
        pytest.skip(f"no published commands at {SEEDS}; set LLAVA_SHARED_DIR")
    return Clone(tmp_path_factory.mktemp("clone"))


def test_deltas_are_added(clone):
    base, llava = clone.path("path/to/llama-7b"), clone.folder / "tiny" / "llava"
    for name in ("huggingface.co/liuhaotian/LLaVA-7b-delta-v0", "path/to/llava_med_delta_weights"):
        make_delta(base, llava, clone.path(name))
    clone.run("apply_delta", "LLaVA-7b-delta-v0")
    clone.run("apply_delta", "llava_med_model")
    for name in ("LLaVA-7b-v0", "llava_med_model"):
        assert (clone.folder / "output/path/to" / name / "config.json").is_file()


def test_instruct_data_is_generated_and_cleaned(clone):
    figures = [{"id": f"f{n}", "caption": f"Caption {n}.", "domain": {"ct_scan": True}} for n in range(4)]
    write_json(clone.path("data/instruct/llava_med_instruct_fig_captions.json"), figures)
    with OpenAIServer("--mode", "dialogue") as server:
        clone.run("instruct_generate.py", OPENAI_BASE_URL=server.url)
    clone.run("instruct_postprocess.py")
    made = clone.folder / "data/instruct/llava_med_instruct_60k_inline_mentions_post.json"
    assert len(read_records(made)) == 4


@pytest.mark.long
@pytest.mark.parametrize("words", [("tune_mm_mlp_adapter",), ("llama-med-vicuna-7b",), ("path/to/eval/vqa_rad/train",)])
def test_the_three_trainings(clone, words):
    """Eight processes each, as published."""
    pytest.importorskip("wandb", reason="wandb isn't installed (extra tracking)")
    for name in ("path/to/pubmed_600k.json", "path/to/eval/vqa_rad/train.json"):
        make_records(clone.path(name).parent, 8, name=Path(name).name)
    shutil.copytree(clone.folder / "path/to/images", clone.path("path/to/pubmed_600k"), dirs_exist_ok=True)
    shutil.copytree(
        clone.folder / "path/to/images", clone.path("data/to/llava_med_instruct_images"), dirs_exist_ok=True
    )
    posted = clone.path("path/to/llava_med_instruct_60k_inline_mention_post.jsonl")
    write_records(posted, read_records(clone.folder / "path/to/pubmed_600k.json"))
    line = clone.line("train_mem.py", *words)
    clone.run("train_mem.py", *words)
    output = Path(re.search(r"--output_dir (\S+)", line)[1])
    assert (clone.folder / output / "config.json").is_file()


def test_chat_answers_are_judged_and_summed_up(clone):
    Image.new("RGB", (40, 30), "red").save(clone.path("data/images/a.png"))
    question = {"text": "Where?", "image": "a.png", "gpt4_answer": "A scan.", "fig_caption": "CT.", "fig_label": "1"}
    question |= {"type": "detail", "in_text_mention": [], "domain": {"ct_scan": True}}
    questions = clone.path("data/eval/llava_med_eval_qa50_qa.jsonl")
    write_records(questions, [{**question, "question_id": n} for n in range(3)])
    clone.path("path/to/save/x")
    clone.run("python model_vqa.py")
    with OpenAIServer("--mode", "judge") as server:
        judged = clone.run("eval_multimodal_chat_gpt_score.py", OPENAI_BASE_URL=server.url)
    assert "no model named: asking for" in judged.stderr
    done = clone.run("summarize_gpt_review.py")
    assert "gpt4-eval-for-individual-answers.jsonl" in done.stderr and "detail" in done.stdout


@pytest.mark.long
def test_vqa_is_answered_and_scored(clone):
    fine_tuned = "path/to/checkpoint_llava_med_instruct_60k_inline_mention/eval/fine_tuned/vqa_rad"
    shutil.copytree(clone.folder / "tiny" / "llava", clone.path(fine_tuned), dirs_exist_ok=True)
    questions = make_records(clone.path("path/to/eval/vqa_rad/x").parent, 9, name="test.json")
    records = json.loads(questions.read_text())
    write_json(questions, [{**one, "answer_type": "OPEN"} for one in records])
    clone.run("run_med_datasets_eval_batch.py")
    answers = clone.folder / fine_tuned / "test-answer-file.jsonl"
    assert len(read_records(answers)) == 9
    first = answers.read_bytes()
    clone.run("model_vqa_med.py")
    assert answers.read_bytes() == first, "the same run again"
    for suffix in ("", ".manifest.json"):
        shutil.copy(f"{answers}{suffix}", clone.path(f"path/to/llava-med/vqa_rad/{answers.name}{suffix}"))
    clone.run("run_eval_batch.py")
    assert len(read_records(clone.folder / "eval_results_med_datasets.jsonl")) == 1
    assert "open: recall" in clone.run("run_eval.py").stdout


def test_controller_worker_message_and_page(clone):
    running = []
    try:
        running.append(clone.start("Uvicorn running on", "llava.serve.controller"))
        for words in (("--num-gpus 2",), ()):
            worker = clone.start("Uvicorn running on", "llava.serve.model_worker", *words)
            running.append(worker)
            assert ("--num-gpus 2: there are 0" in worker.log.read_text()) == bool(words)
            wait_until(lambda: "registered with" in worker.log.read_text(), 60)  # noqa: B023
            clone.run("llava.serve.test_message")
            if words:
                stop(running.pop())
        running.append(clone.start("web page at", "llava.serve.gradio_web_server"))
        wait_until(page_answers, 60)
    finally:
        for process in running[::-1]:
            stop(process)


def can_listen(port: int) -> bool:
    """Whether a server may have it: somebody's outgoing connection may have it for a minute."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


def page_answers() -> bool:
    try:
        return httpx.get("http://127.0.0.1:7860", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(60)
