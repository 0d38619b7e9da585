"""The long-running commands, each with small inputs, as a test of kills needs them."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.records import read_records, write_json, write_records
from tests.data.archive_server import ArchiveServer, Reply, archive
from tests.openai_server import OpenAIServer

Words = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Command:
    """A command that writes below a folder.

    Args:
        prepare: makes the inputs in a folder (and starts a peer for as long as it lasts); gives the command line for
            an output folder.
        output: what it writes there.
        is_whole: whether the output has appeared under its name.
        content: what has to be the same however often it was killed.
        is_final: whether it refuses to run again once its output is there.
    """

    name: str
    prepare: Callable[[Path], contextlib.AbstractContextManager[Words]]
    output: str
    content: Callable[[Path], Any]
    is_whole: Callable[[Path], bool] = Path.exists
    is_final: bool = False


@contextlib.contextmanager
def _training(folder: Path) -> Iterator[Words]:
    from tests.tiny import make_llava
    from tests.train.helpers import flags, make_records

    base, data = make_llava(folder / "base"), make_records(folder / "data", 12)
    more = ("--num_train_epochs", "4", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2")
    yield lambda out: ["-m", "llava.train.train", *flags(out / "model", data, base, *more)]


def _trained(path: Path) -> Any:
    from tests.train.helpers import losses

    return losses(path), _digest(path / "model.safetensors"), _leftovers(path)


@contextlib.contextmanager
def _answering(folder: Path) -> Iterator[Words]:
    from tests.tiny import make_llava

    model = make_llava(folder / "model")
    questions = []
    for number in range(24):
        Image.new("RGB", (30, 40), (number * 9, 99, 50)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"Number {number}?\n<image>"}, {"from": "gpt", "value": "yes"}]
        questions.append({"id": f"q{number}", "image": f"{number}.png", "conversations": turns})
    write_json(folder / "test.json", questions)
    words = ["-m", "llava.eval.model_vqa_med", "--model-name", str(model), "--image-folder", str(folder)]
    words += ["--question-file", str(folder / "test.json"), "--max_new_tokens", "8", "--device", "cpu"]
    yield lambda out: [*words, "--answers-file", str(out / "answers.jsonl")]


@contextlib.contextmanager
def _delta(folder: Path) -> Iterator[Words]:
    from llava.model.convert.delta import make_delta
    from tests.tiny import make_llava

    make_llava(folder, "llama")
    make_delta(folder / "llm", folder / "llava", folder / "delta")
    words = ["-m", "llava.model.apply_delta", "--base", str(folder / "llm"), "--delta", str(folder / "delta")]
    yield lambda out: [*words, "--target", str(out / "target")]


@contextlib.contextmanager
def _download(folder: Path) -> Iterator[Words]:
    """One article in five is dead."""
    rows = []
    with ArchiveServer() as server:
        for number in range(60):
            path = f"/PMC{number}.tar.gz"
            if number % 5:
                server.pages[path] = Reply(archive(("x.jpg", bytes([number]) * 30_000)), delay=0.05)
            rows.append({"pair_id": f"p{number}", "pmc_tar_url": server.url(path), "image_file_path": "x.jpg"})
        write_records(folder / "urls.jsonl", rows)
        words = ["-m", "llava.data.download_images", "--input_path", str(folder / "urls.jsonl"), "--backoff", "0.01"]
        words += ["--requests-per-second", "0", "--retries", "1", "--connections", "2", "--min-free-gb", "0"]
        words += ["--oa-service", server.url("/oa")]
        yield lambda out: [*words, "--images_output_path", str(out / "images")]


@contextlib.contextmanager
def _generation(folder: Path) -> Iterator[Words]:
    write_records(folder / "figures.jsonl", [{"id": f"f{n}", "caption": f"Caption {n}."} for n in range(40)])
    with OpenAIServer("--mode", "dialogue", "--delay", "0.1", "--faults", "0.1", "--kinds", "429,500,cut") as server:
        words = ["-m", "llava.instruct.instruct_generate", "--input_path", str(folder / "figures.jsonl")]
        words += ["--api-base", server.url, "--api-model", "m"]
        yield lambda out: [*words, "--output_path", str(out / "generated.jsonl")]


@contextlib.contextmanager
def _judging(folder: Path) -> Iterator[Words]:
    questions = [
        {"question_id": n, "text": f"Question {n}?", "gpt4_answer": "A scan.", "fig_caption": "CT.", "type": "detail"}
        | {"fig_label": "Fig. 1", "in_text_mention": [], "domain": {"ct_scan": True}}
        for n in range(40)
    ]
    write_records(folder / "q.jsonl", questions)
    write_records(folder / "a.jsonl", [{"question_id": n, "text": f"{n}.", "model_id": "m"} for n in range(40)])
    with OpenAIServer("--mode", "judge", "--delay", "0.1", "--faults", "0.1", "--kinds", "429,500,cut") as server:
        words = ["-m", "llava.eval.eval_multimodal_chat_gpt_score", "--question-file", str(folder / "q.jsonl")]
        words += ["--answers-file", str(folder / "a.jsonl"), "--api-base", server.url, "--api-model", "m"]
        yield lambda out: [*words, "--scores-file", str(out / "scores.jsonl")]


def _rows(path: Path) -> Any:
    """The rows in the order of their content, which the order of replies doesn't change; the same row twice shows."""
    return sorted(json.dumps(row, sort_keys=True) for row in read_records(path)), _leftovers(path.parent)


def _files(path: Path) -> Any:
    """The digests of a folder's files, or of a file."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path.parent)): _digest(file) for file in found}, _leftovers(path.parent)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".tmp"))]


COMMANDS = {
    command.name: command
    for command in (
        Command("training", _training, "model", _trained, lambda path: (path / "config.json").exists()),
        Command("answering", _answering, "answers.jsonl", _files),
        Command("delta", _delta, "target", _files, is_final=True),
        Command("download", _download, "images", _files, lambda path: False),  # images appear one by one
        Command("generation", _generation, "generated.jsonl", _rows),
        Command("judging", _judging, "scores.jsonl", _rows),
    )
}


def argv(words: list[str]) -> list[str]:
    return [sys.executable, *words]
