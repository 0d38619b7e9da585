"""G3: LoRA folders as LLaVA's training writes them (old .bin, new safetensors): merged weights, logits, tokens."""

import json
import re

import numpy as np
import pytest

from llava.model import load_pretrained_model
from tests.conftest import golden_cases
from tests.golden.recorded_logits import Case, expand, greedy, logits_of

CASES = golden_cases("G3_llava_llama_lora")


@pytest.fixture(scope="module", params=CASES)
def case(request, golden_dir) -> Case:
    case = Case(request.param)
    case.records = json.loads((request.param / "inputs_outputs.json").read_text())
    return case


@pytest.fixture(scope="module")
def loaded(case, golden_dir):
    training = golden_dir / "G8_training"
    return load_pretrained_model(
        case.checkpoint(),
        training / "base_llama",
        vision_tower=training / "clip_tower",
        device="cpu",
        dtype="float32",
    )


def test_merged_weights(case, loaded):
    tolerance = float(re.search(r"merged weights ([\d.e+-]+)", case.meta["tolerance"])[1])
    merged = np.load(case.folder / "merged_small_weights.npz")
    weights = loaded.model.state_dict()
    assert len(merged.files) > 10
    for name in merged.files:
        assert np.abs(weights[name].numpy() - merged[name]).max() <= tolerance, name


def test_prompt_ids(case, loaded):
    for record in case.records:
        pieces = [loaded.tokenizer(piece).input_ids for piece in record["prompt"].split("<image>")]
        ids = pieces[0]
        for piece in pieces[1:]:
            ids = [*ids, -200, *piece[1:]]
        assert ids == record["input_ids"], record["name"]


def test_logits_and_greedy_tokens(case, loaded):
    for record in case.records:
        name = record["name"]
        ids = expand(record["input_ids"], loaded.model.num_patches)
        assert len(ids) == record["n_positions"]
        pixel_values = case.pixel_values(name)
        case.compare(name, logits_of(loaded.model, ids, pixel_values))
        case.compare_greedy(name, record, greedy(loaded.model, ids, pixel_values))
