"""The loss of an optimizer step: by default the mean of micro-batch means, with `tokens` the mean over its targets."""

import pytest
from safetensors.torch import load_file

from llava.train.arguments import parse_arguments
from llava.train.train import train
from tests.train.helpers import flags, losses, make_records
from tests.train.test_distributed import FSDP, FSDP_ON_CPU, TRAIN, launch, needs_deepspeed, zero

STEPS = ("--max_steps", "5")
TOKENS = ("--loss_normalisation", "tokens")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Answers of one, two and three sentences, so a step's samples have unlike numbers of targets."""
    return make_records(tmp_path_factory.mktemp("data"), 24, text_only_every=3)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory, base, data):
    """A step's four samples as one batch: its mean is over all its targets, whatever the flag says."""
    folder = tmp_path_factory.mktemp("at_once")
    train(flags(folder, data, base, *STEPS, "--per_device_train_batch_size", "4"))
    return folder


@pytest.mark.parametrize(
    ("processes", "script", "more"),
    [
        pytest.param(1, TRAIN, (), id="one"),
        pytest.param(2, TRAIN, (), id="ddp"),
        pytest.param(2, FSDP_ON_CPU, FSDP, id="fsdp2"),
        pytest.param(2, TRAIN, zero(2), id="zero2", marks=needs_deepspeed),
    ],
)
def test_every_token_weighs_alike_over_micro_batches_and_processes(
    tmp_path, base, data, at_once, processes, script, more
):
    split = (*STEPS, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(4 // processes), *more)
    launch(processes, script, *flags(tmp_path / "tokens", data, base, *split, *TOKENS))
    assert losses(tmp_path / "tokens") == pytest.approx(losses(at_once), abs=1e-5)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (at_once, tmp_path / "tokens"))
    # Where a gradient is almost zero Adam's step is its rounding; half a step of 1e-3 bounds that.
    assert max((wanted[name] - found[name]).abs().max() for name in wanted) < 5e-4
    if processes == 1:
        train(flags(tmp_path / "means", data, base, *split))
        assert losses(tmp_path / "means") != pytest.approx(losses(at_once), abs=1e-3)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ((), "micro_batches"),
        (("--packing",), "micro_batches"),
        (("--packing", "--max_tokens_per_batch", "200"), "tokens"),
        (("--packing", "--max_tokens_per_batch", "200", "--loss_normalisation", "micro_batches"), "micro_batches"),
    ],
)
def test_what_holds_without_the_flag(tmp_path, base, data, more, wanted):
    assert parse_arguments(flags(tmp_path, data, base, *more)).training.loss_normalisation == wanted
