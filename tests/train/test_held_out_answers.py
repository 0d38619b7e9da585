"""Held-out questions answered during a training: by the model as it is, the same under sharding, scored and shown."""

import json

import pytest

from llava.errors import LlavaError
from llava.eval.metrics import strict_item
from llava.generation import Engine, Request, SamplingParams
from llava.model import load_pretrained_model
from llava.tokenization import conversation_from_record
from llava.train.arguments import parse_arguments
from llava.train.train import train
from tests.train.helpers import flags, losses, make_records
from tests.train.test_distributed import FSDP, FSDP_ON_CPU, TRAIN, launch, needs_deepspeed, zero

RUN = ("--max_steps", "20", "--learning_rate", "1e-2", "--per_device_train_batch_size", "4")
ASKED = ("--eval_strategy", "steps", "--eval_steps", "10", "--eval_generate", "5", "--eval_max_new_tokens", "8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_records(folder, 13, text_only_every=3, name="held_out.json")
    return make_records(folder, 24, text_only_every=3)


def answers(folder, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "eval_answers" / f"step-{step}.jsonl").read_text().splitlines()]


def answers_by_hand(folder, data) -> list[str]:
    """What the finished model says, asked as a served one is."""
    loaded = load_pretrained_model(folder, device="cpu")
    records = json.loads(data.with_name("held_out.json").read_text())
    requests = []
    for record in [records[number] for number in (0, 3, 6, 9, 12)]:
        conversation = conversation_from_record(record, loaded.model.config.conversation_template)
        images = [data.parent / "images" / record["image"]] if "image" in record else []
        requests.append(Request(conversation, images, SamplingParams(max_new_tokens=8)))
    return [answer.text for answer in Engine(loaded).generate(requests)]


@pytest.mark.parametrize(
    ("processes", "script", "more"),
    [
        pytest.param(1, TRAIN, (), id="one"),
        pytest.param(1, TRAIN, ("--lora_enable", "True", "--packing"), id="lora", marks=pytest.mark.long),
        pytest.param(2, FSDP_ON_CPU, FSDP, id="fsdp2"),
        pytest.param(2, TRAIN, zero(3), id="zero3", marks=[needs_deepspeed, pytest.mark.long]),
        pytest.param(
            1, FSDP_ON_CPU, (*FSDP, "--bf16", "True", "--packing"), id="one_as_on_a_gpu", marks=pytest.mark.long
        ),
    ],
)
def test_answers_are_the_models_own_and_training_goes_on_as_without(
    tmp_path, base, data, monkeypatch, processes, script, more
):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    held = ("--eval_data_path", str(data.with_name("held_out.json")))
    words = flags(tmp_path / "with", data, base, *RUN, *ASKED, *held, *more)
    place = words.index("--report_to") + 1
    words[place] = "all"
    launch(processes, script, *words)
    found = answers(tmp_path / "with", 20)
    assert [line["question_id"] for line in found] == ["r0", "r3", "r6", "r9", "r12"]
    if not {"--lora_enable", "--bf16"} & set(more):
        assert [line["text"] for line in found] == answers_by_hand(tmp_path / "with", data)
    history = json.loads((tmp_path / "with" / "trainer_state.json").read_text())["log_history"]
    score = [entry["eval_strict_open"] for entry in history if "eval_strict_open" in entry]
    recalls = [strict_item(line["text"], line["reference"]).recall for line in found]
    assert len(score) == 2 and score[-1] == pytest.approx(100 * sum(recalls) / 5) and score[-1] > 0
    assert len(answers(tmp_path / "with", 10)) == 5
    (events,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    assert b"| question | reference | answer |" in events.read_bytes()
    assert b"train/data_wait" in events.read_bytes()
    table = json.loads(max(tmp_path.glob("wandb/offline-run-*/files/media/table/eval/answers_*.json")).read_text())
    assert table["columns"] == ["question", "reference", "answer"]
    assert len(table["data"]) == 5 and all(row[0] in ("Which colour?", "Say something.") for row in table["data"])
    launch(processes, script, *flags(tmp_path / "without", data, base, *RUN, *more))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_a_metric_that_the_questions_dont_have_is_refused_before_training(tmp_path, base, data):
    more = ("--eval_data_path", str(data.with_name("held_out.json")), "--metric_for_best_model", "strict_closed")
    with pytest.raises(LlavaError, match="none of --eval_generate's 5 questions is CLOSED"):
        train(flags(tmp_path, data, base, *RUN, *ASKED, *more))


def test_metrics_of_answers_may_choose_the_best(tmp_path, base, data):
    more = ("--eval_data_path", str(data.with_name("held_out.json")), "--metric_for_best_model", "strict_open")
    training = parse_arguments(flags(tmp_path, data, base, *ASKED, *more)).training
    assert training.greater_is_better


@pytest.mark.parametrize("lazy", ["True", "False"])
def test_questions_whose_image_is_unreadable_are_left_out_too(tmp_path, base, lazy):
    data = make_records(tmp_path, 12)
    held = make_records(tmp_path, 8, name="held_out.json")
    (tmp_path / "images" / "blue.png").write_bytes(b"not an image")
    (tmp_path / "images" / "red.png").unlink()
    more = ("--eval_data_path", str(held), "--skip_unreadable_images", "--lazy_preprocess", lazy)
    train(flags(tmp_path / "out", data, base, *ASKED, *more, "--max_steps", "2", "--eval_steps", "2"))
    assert {line["question_id"] for line in answers(tmp_path / "out", 2)} == {"r1", "r3", "r5", "r7"}
    summary = json.loads((tmp_path / "out" / "training_summary.json").read_text())
    assert summary["validation"]["left_out"]["count"] == 4
