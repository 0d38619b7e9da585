"""G1: LLaVA-Med v1.5 (Mistral), tower inside the checkpoint and apart: ids, features, logits, greedy tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.model import load_tokenizer
from llava.model.checkpoint.layouts import open_checkpoint
from llava.model.loader import load_model
from llava.model.weights.quantized import Quantization
from tests.conftest import golden_cases
from tests.golden.recorded_logits import Case, batch_logits, expand, greedy, logits_of

CASES = golden_cases("G1_v15_mistral")


def open_case(folder: Path) -> Case:
    # Where the checkpoint holds a fine-tuned tower, `outputs_v15` records the reference's fault 1: it dropped it.
    name = "outputs_haotian" if (folder / "outputs_haotian.npz").exists() else "outputs_v15"
    case = Case(folder, f"{name}.npz")
    case.records = json.loads((folder / f"{name}.json").read_text())
    case.inputs = {item["name"]: item for item in json.loads((folder / "inputs.json").read_text())}
    return case


def cases_with(has: Callable[[Case], bool]) -> list:
    """Those that hold what a test compares; where there are no golden vectors, the one that says so."""
    return [case for case in CASES if case.values[0] is None or has(open_case(case.values[0]))]


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return open_case(request.param)


@pytest.fixture(scope="module")
def model(case):
    # One case has ids alone and no tokenizer, so the model is loaded without one.
    return load_model(open_checkpoint(case.checkpoint()), torch.device("cpu"), torch.float32, Quantization())


@pytest.mark.parametrize(
    "case", cases_with(lambda case: (case.checkpoint() / "tokenizer.model").exists()), indirect=True
)
def test_prompt_ids(case):
    tokenizer = load_tokenizer(case.checkpoint())
    for name, item in case.inputs.items():
        pieces = [tokenizer(piece).input_ids for piece in item["prompt"].split(DEFAULT_IMAGE_TOKEN)]
        ids = pieces[0]
        for piece in pieces[1:]:
            ids = [*ids, IMAGE_TOKEN_INDEX, *piece[1:]]
        assert ids == item["input_ids"], name


def test_image_features(case, model):
    for name in case.inputs:
        if f"{name}.image_features0" in case.outputs:
            with torch.no_grad():
                features = model.encode_images(case.pixel_values(name))[0].numpy()
            assert np.abs(features - case.outputs[f"{name}.image_features0"]).max() <= case.tolerance, name


def test_logits(case, model):
    for name, item in case.inputs.items():
        ids = expand(item["input_ids"], model.num_patches)
        case.compare(name, logits_of(model, ids, case.pixel_values(name)))


def test_greedy_tokens(case, model):
    for name, item in case.inputs.items():
        ids = expand(item["input_ids"], model.num_patches)
        case.compare_greedy(name, case.records[name], greedy(model, ids, case.pixel_values(name)))


@pytest.mark.parametrize("case", cases_with(lambda case: "batch0.logits_cols" in case.outputs), indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(case, model, side):
    names = ["single_turn", "no_image"]
    samples = [expand(case.inputs[name]["input_ids"], model.num_patches) for name in names]
    for row, logits in enumerate(batch_logits(model, samples, case.pixel_values("single_turn"), side)):
        case.compare(f"batch{row}", logits)
