"""Models whose head is the embedding, over shards: the two stay one weight, in training and in what is saved."""

import json

import pytest
from safetensors.torch import load_file

from tests.tiny import make_llava
from tests.train.helpers import flags, losses, make_records
from tests.train.test_distributed import FSDP, FSDP_ON_CPU, TRAIN, launch

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(name, processes, *flags)`: (losses, weights) of a training of a tied model; 0 processes: without FSDP."""
    folder = tmp_path_factory.mktemp("tied")
    base = make_llava(folder / "base", tie_word_embeddings=True)
    data = make_records(folder / "data", 24, text_only_every=3)

    def start(name: str, processes: int, *more: str):
        common = ("--max_steps", str(STEPS), "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", *more)
        if not processes:
            launch(1, TRAIN, *flags(folder / name, data, base, *common))
        else:
            launch(processes, FSDP_ON_CPU, *flags(folder / name, data, base, *FSDP, *common))
        assert json.loads((folder / name / "config.json").read_text())["tie_word_embeddings"] is True
        return losses(folder / name), load_file(folder / name / "model.safetensors")

    return start


@pytest.mark.parametrize("processes, half", [(1, False), (1, True), (2, False), (2, True)])
def test_the_head_stays_the_embedding(run, processes, half):
    batch = ("--per_device_train_batch_size", "1")
    whole, expected = run(f"whole_{processes}_{half}", 0, *batch, "--gradient_accumulation_steps", str(processes))
    found, weights = run(f"shards_{processes}_{half}", processes, *batch, *(("--bf16", "True") if half else ()))
    assert found == pytest.approx(whole, abs=3e-2 if half else 1e-4)
    assert "lm_head.weight" not in weights
    name = "model.embed_tokens.weight"
    moved = (weights[name] - expected[name]).abs().mean() / expected[name].abs().mean()
    assert moved < (5e-2 if half else 1e-4)
