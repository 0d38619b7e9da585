"""Answer files: in the order of the questions, whole or resumable, with a manifest, images checked first."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.eval import model_vqa, model_vqa_med, run_med_datasets_eval_batch
from llava.eval.answers.ablation import QuestionImages
from llava.eval.answers.questions import read_med_questions
from llava.model.convert.projector_extract import extract_projector
from llava.records import read_records
from tests.tiny import make_llava

NUMBER = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions in both forms, over six images, a question without one among them."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{index}.png")
    records, lines = [], []
    for index in range(NUMBER):
        text = f"What does the picture show? {'abc ' * (index % 5)}".strip()
        image = None if index == 7 else f"p{index % 6}.png"
        record = {"id": f"q{index}", "answer_type": "CLOSED" if index % 2 else "OPEN"}
        human = {"from": "human", "value": text if image is None else f"{text}\n<image>"}
        record["conversations"] = [human, {"from": "gpt", "value": "yes"}]
        line = {"question_id": index, "text": text}
        if image:
            record["image"] = line["image"] = image
        records.append(record)
        lines.append(line)
    (folder / "test.json").write_text(json.dumps(records))
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def flags(model, data, answers, *more, questions="test.json"):
    common = ["--model-name", str(model), "--image-folder", str(data), "--question-file", str(data / questions)]
    return [*common, "--answers-file", str(answers), "--max_new_tokens", "8", *more]


def answer(model, data, path, *more):
    model_vqa_med.main(flags(model, data, path, *more))
    return read_records(path)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "answers.jsonl"
    model_vqa_med.main(flags(model, data, path))
    return path


def test_answers_stand_in_the_order_of_the_questions(finished):
    answers = read_records(finished)
    assert [row["question_id"] for row in answers] == [f"q{index}" for index in range(NUMBER)]
    assert set(answers[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert answers[0]["prompt"] == "What does the picture show?" and answers[0]["model_id"] == "llava"
    assert len({row["text"] for row in answers}) > 3


def test_manifest_says_what_made_the_answers(finished, model, data):
    manifest = json.loads(finished.with_name("answers.jsonl.manifest.json").read_text())
    assert manifest["checkpoint"] == str(model) and manifest["template"] == "vicuna_v1"
    assert manifest["decoding"] == {
        "temperature": 0.0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 8,
        "seed": 0,
    }
    assert manifest["counts"]["questions"] == NUMBER and manifest["counts"]["images"] == 6
    assert len(manifest["sha256"]) == len(manifest["questions_sha256"]) == len(manifest["checkpoint_digest"]) == 64
    assert {"torch", "transformers", "python"} <= set(manifest["versions"])


def test_jsonl_questions_get_the_same_answers(finished, model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    model_vqa.main(flags(model, data, path, questions="test.jsonl"))
    rows = read_records(path)
    assert [row["question_id"] for row in rows] == list(range(NUMBER))
    assert [row["text"] for row in rows] == [row["text"] for row in read_records(finished)]


def test_a_finished_file_is_not_answered_again(finished, model, data, monkeypatch):
    before = finished.read_bytes()
    monkeypatch.setattr("llava.eval.answers.local.LocalModel.load", lambda self: pytest.fail("loaded the model"))
    model_vqa_med.main(flags(model, data, finished))
    assert finished.read_bytes() == before


def test_a_half_written_file_is_finished_and_equal(finished, model, data, tmp_path, monkeypatch):
    """Whatever line the kill came in, also in the middle of one, the end is the same."""
    monkeypatch.setattr("llava.eval.answers.local.SAVE_EVERY", 8)
    path = tmp_path / "answers.jsonl"
    whole = finished.read_bytes()
    for cut in (1, len(whole) // 3, len(whole) - 3):
        part = path.with_name("answers.jsonl.part")
        stopped = stop_after(1, model, data, path)
        assert part.exists() and not path.exists() and stopped
        part.write_bytes(whole[:cut])
        assert answer(model, data, path) and path.read_bytes() == whole
        assert not part.exists() and not path.with_name("answers.jsonl.part.json").exists()
        path.unlink()


def stop_after(count, model, data, path):
    """A run that fails after `count` answers, as if killed there."""
    import llava.resumable

    class Stop(Exception):
        pass

    add, seen = llava.resumable.ResumableJsonl.add, []

    def stopping(self, record):
        if len(seen) == count:
            raise Stop
        seen.append(record)
        add(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava.resumable.ResumableJsonl, "add", stopping)
        with pytest.raises(Stop):
            model_vqa_med.main(flags(model, data, path))
    return seen


def test_answers_of_another_run_are_not_continued(model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    stop_after(3, model, data, path)
    with pytest.raises(LlavaError, match=r"another run began \(different: decoding\)"):
        model_vqa_med.main(flags(model, data, path, "--temperature", "0.5"))
    assert len(answer(model, data, path, "--temperature", "0.5", "--overwrite")) == NUMBER


def test_answers_of_an_earlier_version_go_on(finished, model, data, tmp_path):
    """A part and its claim as versions wrote them that knew five parameters."""
    path = tmp_path / "answers.jsonl"
    stop_after(1, model, data, path)
    claim = path.with_name("answers.jsonl.part.json")
    kept = json.loads(claim.read_text())
    old = {"temperature": 0.0, "top_p": None, "num_beams": 1, "max_new_tokens": 8, "seed": 0}
    settings = kept["settings"] | {"decoding": old}
    text = json.dumps(settings, sort_keys=True)
    claim.write_text(json.dumps({"fingerprint": hashlib.sha256(text.encode()).hexdigest(), "settings": settings}))
    assert answer(model, data, path) == read_records(finished)


def test_sampling_depends_on_the_seed_alone(model, data, tmp_path):
    sampled = ["--temperature", "1.0", "--top_p", "0.9", "--seed"]
    first = answer(model, data, tmp_path / "a.jsonl", *sampled, "1")
    again = answer(model, data, tmp_path / "b.jsonl", *sampled, "1", "--batch-size", "5")
    other = answer(model, data, tmp_path / "c.jsonl", *sampled, "2")
    assert [row["text"] for row in first] == [row["text"] for row in again]
    assert [row["text"] for row in first] != [row["text"] for row in other]


def test_parts_together_are_the_whole(finished, model, data, tmp_path):
    rows = []
    for index in range(3):
        rows += answer(model, data, tmp_path / f"{index}.jsonl", "--num-chunks", "3", "--chunk-idx", str(index))
    assert rows == read_records(finished)


def test_several_processes_write_one_file(finished, model, data, tmp_path):
    path = tmp_path / "out" / "answers.jsonl"
    run_med_datasets_eval_batch.main(flags(model, data, path, "--num-chunks", "2", "--device", "cpu"))
    assert path.read_bytes() == finished.read_bytes()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.manifest.json"]
    manifest = json.loads(path.with_name("answers.jsonl.manifest.json").read_text())
    assert manifest["processes"] == 2 and manifest["counts"]["questions"] == NUMBER


def test_a_failing_process_is_an_error_and_leaves_no_file(model, data, tmp_path, monkeypatch):
    path, python = tmp_path / "answers.jsonl", tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LlavaError, match="of 2 stopped at the error above"):
        run_med_datasets_eval_batch.main(flags(model, data, path, "--num-chunks", "2"))
    assert not path.exists()


@pytest.mark.parametrize("ablation", ["blank", "noise", "shuffle"])
def test_ablated_answers_name_the_ablation(ablation, finished, model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = answer(model, data, path, "--ablate-image", ablation)
    plain = read_records(finished)
    assert rows != plain and rows[7]["text"] == plain[7]["text"]  # the question without image stays as it is
    assert json.loads(path.with_name("answers.jsonl.manifest.json").read_text())["ablate_image"] == ablation


def test_shuffled_images_are_always_others(data):
    questions = read_med_questions(data / "test.json")
    images = QuestionImages(data, questions, "shuffle", seed=5)
    swapped = {question.images[0]: images.of(question)[0].name for question in questions if question.images}
    assert sorted(swapped) == sorted(swapped.values()) and all(a != b for a, b in swapped.items())


def test_noise_is_the_images_own_and_repeats(data):
    questions = [question for question in read_med_questions(data / "test.json") if question.images]
    first, second = (QuestionImages(data, questions, "noise", seed=1) for _ in range(2))
    a, b, c = first.of(questions[0])[0], second.of(questions[0])[0], first.of(questions[1])[0]
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize("fitted", ["square", "anyres"])
def test_yes_no_probabilities_are_written_for_closed_questions(fitted, model, data, tmp_path):
    model = model if fitted == "square" else make_llava(tmp_path / "tiled", image_aspect_ratio=fitted)
    rows = answer(model, data, tmp_path / "a.jsonl", "--yes-no-probabilities")
    known = [row["metadata"].get("p_yes") for row in rows]
    assert all((chance is None) == (index % 2 == 0) for index, chance in enumerate(known))
    assert all(0 < chance < 1 for chance in known if chance is not None)
    one_by_one = answer(model, data, tmp_path / "b.jsonl", "--yes-no-probabilities", "--batch-size", "1")
    again = [row["metadata"].get("p_yes") for row in one_by_one]
    assert [c for c in known if c] == pytest.approx([c for c in again if c], abs=1e-5)


def words_of(monkeypatch, **ids):
    """What `_answer_tokens` finds where the four words have these ids."""
    from llava.eval.answers import yes_no

    monkeypatch.setattr(yes_no, "_target_ids", lambda word, *_: ids[word])
    return yes_no._answer_tokens(None, None, None)


def test_tokens_that_tell_yes_from_no_are_found_whatever_the_words_begin_with(monkeypatch):
    blank = {"yes": [3, 5, 2], "no": [3, 6, 2]}
    assert words_of(monkeypatch, **blank, Yes=[3, 7, 2], No=[3, 8, 2]) == ([3], {5, 7}, {6, 8})
    # Upper case has a token with its blank, lower case has none.
    assert words_of(monkeypatch, **blank, Yes=[9, 2], No=[10, 2]) == ([3], {5}, {6})
    assert words_of(monkeypatch, yes=[0, 2], no=[0, 2], Yes=[9, 2], No=[10, 2]) == ([], {9}, {10})
    with pytest.raises(LlavaError, match="no token that tells yes from no; leave the flag out"):
        words_of(monkeypatch, yes=[0, 2], no=[0, 2], Yes=[0, 2], No=[0, 2])


def test_a_tokenizer_without_such_tokens_is_found_out_before_the_model_is_loaded(model, data, tmp_path, monkeypatch):
    from llava.eval.answers import yes_no

    monkeypatch.setattr(yes_no, "_target_ids", lambda *_: [0, 2])
    monkeypatch.setattr("llava.eval.answers.local.LocalModel.load", lambda self: pytest.fail("loaded the model"))
    with pytest.raises(LlavaError, match="no token that tells yes from no"):
        answer(model, data, tmp_path / "a.jsonl", "--yes-no-probabilities")


@pytest.mark.parametrize("fitted", ["square", "anyres"])
def test_likelihoods_of_options_are_the_models_own(fitted, model, data, tmp_path):
    """Each option's log probability by hand, from the first id that differs on, and equal in every batch; also of a
    model that sees tiles."""
    from llava.conversation import get_template
    from llava.images import open_image
    from llava.model import load_pretrained_model
    from llava.tokenization import encode_conversation

    turns = [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "A"}]
    records = [
        {"id": "q0", "image": "p0.png", "conversations": turns, "options": ["left lung", "left", "no"]},
        {"id": "q1", "image": "p1.png", "conversations": turns, "options": {"A": "yes", "B": "a long option of words"}},
        {"id": "q2", "image": "p1.png", "conversations": turns},
    ]
    (data / "choice.json").write_text(json.dumps(records))
    model = model if fitted == "square" else make_llava(tmp_path / "tiled", image_aspect_ratio=fitted)
    runs = []
    for size in ("32", "1"):
        path = tmp_path / f"{size}.jsonl"
        more = ["--option-likelihoods", "--batch-size", size]
        model_vqa_med.main(flags(model, data, path, *more, questions="choice.json"))
        runs.append([row["metadata"] for row in read_records(path)])
    assert "option_letters" not in runs[0][2] and [len(one["option_letters"]) for one in runs[0][:2]] == [3, 2]
    for one, other in zip(*runs):
        for kind in ("option_letters", "option_texts"):
            pairs = [[found["log_probability"] for found in run.get(kind, ())] for run in (one, other)]
            assert pairs[0] == pytest.approx(pairs[1], abs=1e-5)

    loaded = load_pretrained_model(str(model))
    template = get_template(loaded.model.config.conversation_template)
    image = np.asarray(loaded.image_processor([open_image(data / "p0.png")], loaded.model.config.image_aspect_ratio))
    image = image.reshape(-1, *image.shape[-3:])
    assert (len(image) > 1) == (fitted == "anyres")
    samples = []
    for option in records[0]["options"]:
        record = [turns[0], {"from": "gpt", "value": option}]
        features = [len(image) * loaded.model.num_patches]
        samples.append(encode_conversation(record, template, loaded.tokenizer, features_per_image=features))
    ids = [sample.input_ids for sample in samples]
    start = next(place for place, column in enumerate(zip(*ids)) if len(set(column)) > 1)
    for sample, found in zip(samples, runs[0][0]["option_texts"], strict=True):
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([sample.input_ids]), pixel_values=torch.from_numpy(image)).logits[0]
        logs = logits.double().log_softmax(-1)
        learned = [place for place in range(start, len(sample.labels)) if sample.labels[place] != -100]
        by_hand = sum(float(logs[place - 1, sample.input_ids[place]]) for place in learned)
        assert found == {"log_probability": pytest.approx(by_hand, abs=1e-5), "tokens": len(learned)}


def test_answer_prompter_asks_twice(finished, model, data, tmp_path):
    rows = answer(model, data, tmp_path / "a.jsonl", "--answer-prompter")
    plain = read_records(finished)
    assert all(row["text"].startswith(one["text"] + "\nANSWER:") for row, one in zip(rows, plain))
    both, first = ([one["metadata"] for one in part] for part in (rows, plain))
    assert sum(one["tokens"] for one in both) > sum(one["tokens"] for one in first)
    assert sum(one["finish_reason"] == "length" for one in both) >= sum(o["finish_reason"] == "length" for o in first)


BAD = {
    "a missing image": (["--image-folder", "{tmp}"], '23 images are missing|6 images are missing.*question "q0"'),
    "an unknown template": (["--conv-mode", "nonsense"], "nonsense"),
    "no such questions": (["--question-file", "{tmp}/none.json"], "--question-file not found"),
    "no such folder": (["--image-folder", "{tmp}/none"], "--image-folder is not a folder"),
    "no room for an answer": (["--max_new_tokens", "0"], "--max_new_tokens is 0"),
    "a top_p above one": (["--top_p", "1.5"], "--top_p is 1.5"),
    "a part that isn't": (["--num-chunks", "2", "--chunk-idx", "2"], "--chunk-idx is 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_before_the_model_is_loaded(name, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("llava.eval.answers.local.LocalModel.load", lambda self: pytest.fail("loaded the model"))
    more, message = BAD[name]
    with pytest.raises(LlavaError, match=message):
        model_vqa_med.main(flags(model, data, tmp_path / "a.jsonl", *(m.format(tmp=tmp_path) for m in more)))
    assert not (tmp_path / "a.jsonl").exists()


def test_an_unreadable_image_is_an_error_that_names_it(model, data, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "text": "?", "image": "broken.png"}) + "\n")
    with pytest.raises(LlavaError, match=r"broken\.png"):
        model_vqa.main(flags(model, tmp_path, tmp_path / "a.jsonl", "--question-file", str(questions)))


def test_killed_at_ten_random_moments_the_file_is_the_same(finished, model, data, tmp_path):
    """Real processes, real SIGKILLs, at any moment from the start of Python to the last answer."""
    path = tmp_path / "answers.jsonl"
    # One answer after the other, so that a kill can come between two.
    more = ("--device", "cpu", "--batch-size", "1")
    command = [sys.executable, "-m", "llava.eval.model_vqa_med", *flags(model, data, path, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def remove_finished():
        path.unlink(missing_ok=True)
        path.with_name("answers.jsonl.manifest.json").unlink(missing_ok=True)

    started = time.monotonic()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    whole = time.monotonic() - started
    assert path.read_bytes() == finished.read_bytes()
    remove_finished()
    moments = random.Random(7)
    part, kept = path.with_name("answers.jsonl.part"), []
    for number in range(10):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if number % 2:  # at any moment of the run
            time.sleep(moments.uniform(0.3, 1.0) * whole)
        else:  # as soon as one answer more is on disk
            size = part.stat().st_size if part.exists() else 0
            while process.poll() is None and not (part.exists() and part.stat().st_size > size):
                time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(part.stat().st_size if part.exists() else 0)
        if path.exists():  # the kill came too late: it begins anew
            assert path.read_bytes() == finished.read_bytes()
            remove_finished()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert path.read_bytes() == finished.read_bytes()
    assert any(kept), "no kill left a half-written file"


def test_a_projector_over_a_language_model_answers_as_the_whole(model, data, finished, tmp_path):
    extract_projector(model, tmp_path / "projector")
    (path,) = (tmp_path / "projector").glob("mm_projector.*")
    llm = model.parent / "llm"
    rows = answer(llm, data, tmp_path / "a.jsonl", "--mm-projector", str(path))
    assert [row["text"] for row in rows] == [row["text"] for row in read_records(finished)]
    other = path.with_name("other.bin")
    path.rename(other)
    with pytest.raises(LlavaError, match=r"--mm-projector .*other\.bin: .*mm_projector"):
        answer(llm, data, tmp_path / "b.jsonl", "--mm-projector", str(other))
