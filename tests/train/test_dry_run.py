"""The dry run of a small model, its memory counted by two other methods."""

import gc
import json
import logging
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from llava.bars import tqdm
from llava.errors import LlavaError
from llava.train.estimate import dry_run as module
from llava.train.estimate.costs import Clock, Work
from llava.train.estimate.dry_run import beside_eager, dry_run
from llava.train.estimate.tracker import Tracker
from llava.train.estimate_memory import build_parser, main
from llava.train.step import gpu
from llava.train.step.hardware import GPUS, find_gpu, peak_of
from tests.train.helpers import SHARDED, SMALL, configs_alone

H100 = GPUS["h100"]
SAVING = ("--gradient_checkpointing", "True")
BF16_ALONE = ("--optim", "adamw_torch_8bit", "--master_weights", "False")
COMPILED = ("--packing", "True", "--torch_compile", "True")
ACCUMULATED = ("--gradient_accumulation_steps", "3")
HEADING = "each in addition to those above it:\n"  # of the flags that would make a recipe fit


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return configs_alone(tmp_path_factory.mktemp("base"))


def alive_bytes(mode) -> int:
    """Bytes of all tensors without content that Python knows to be alive, each storage once."""
    storages = {}
    for one in gc.get_objects():
        if type(one) is FakeTensor and one.fake_mode is mode and one.device.type == "cpu":
            storage = one.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class Compared(Tracker):
    """A tracker that looks at everything alive at every so many operators of the step."""

    every = 331
    found: ClassVar[list[tuple[int, int]]] = []

    def _count(self, function, args, kwargs, inputs, outputs, out):
        super()._count(function, args, kwargs, inputs, outputs, out)
        fake = [tensor for tensor in (*inputs, *outputs) if type(tensor) is FakeTensor]
        in_step = "moments" in self.memory.kinds.values()
        if in_step and self.operators % self.every == 0 and fake:
            self.memory.look_at_resized()
            self.found.append((self.memory.total, alive_bytes(fake[0].fake_mode)))


@pytest.mark.parametrize(
    ("gpus", "flags"),
    [
        (4, (*SHARDED,)),
        (4, (*SHARDED, *ACCUMULATED, *SAVING)),
        (1, ()),
        (1, (*ACCUMULATED, *SAVING)),
        (1, (*SAVING, "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}')),
        (1, ("--lora_enable", "True", *SAVING)),
        (1, ("--tune_mm_mlp_adapter", "True", "--packing", "True")),
        (1, ("--packing", "True", "--keep_half_weights", "False")),
        (1, (*COMPILED, *ACCUMULATED)),
        (1, (*COMPILED, "--activation_memory_budget", "0.5")),
        (1, (*COMPILED, "--activation_memory_budget", "0", *ACCUMULATED)),
        (1, (*COMPILED, "--activation_memory_budget", "0.5", "--lora_enable", "True")),
        (1, (*COMPILED, "--activation_memory_budget", "0.5", *BF16_ALONE, *ACCUMULATED)),
        (4, (*COMPILED, "--activation_memory_budget", "0.5", *SHARDED, *ACCUMULATED)),
        (1, ("--lora_enable", "True", "--bits", "8")),
        (1, ("--lora_enable", "True", "--bits", "4", *SAVING)),
        (4, ("--bf16", "False", *ACCUMULATED)),
        (1, (*BF16_ALONE, *ACCUMULATED)),
    ],
)
def test_memory_agrees_with_a_look_at_everything_alive(base, monkeypatch, gpus, flags):
    for word, package in (("--bits", "bitsandbytes"), ("adamw_torch_8bit", "torchao")):
        if word in flags:
            pytest.importorskip(package)
    monkeypatch.setattr(module, "Tracker", Compared)
    monkeypatch.setattr(Compared, "found", [])
    prediction = dry_run([*base, *SMALL, *flags], H100, gpus)
    assert len(Compared.found) >= 4
    for counted, alive in Compared.found:
        assert counted == pytest.approx(alive, rel=0.05)
    assert prediction.peak_gb * 1e9 >= max(alive for _, alive in Compared.found) * 0.95
    assert sum(prediction.parts_gb.values()) == pytest.approx(prediction.peak_gb)
    # bitsandbytes looks for outliers in each 8-bit layer's input: seven of them in each of the model's eight layers.
    assert prediction.host_syncs_per_micro_batch == (56 if "8" in flags else 0)
    assert prediction.reduce_dtype == ("bfloat16" if "--master_weights" in flags else "float32")


def test_parts_are_what_arithmetic_says(base):
    """16 bytes per trained parameter; over four processes a quarter of them."""
    one = dry_run([*base, *SMALL, *ACCUMULATED], H100, 1)
    four = dry_run([*base, *SMALL, *ACCUMULATED, *SHARDED], H100, 4)
    moments = one.parts_gb["moments"]
    assert one.parts_gb["gradients"] == pytest.approx(moments / 2, rel=0.02)
    assert one.parts_gb["gathered weights"] == pytest.approx(moments / 4, rel=0.1)  # two bytes each, and the tower's
    assert four.parts_gb["moments"] == pytest.approx(moments / 4, rel=0.02)


def test_a_checkpoint_is_gathered_and_not_written(base, monkeypatch):
    """Four bytes a weight for the model, and for resuming as many again and eight for moments."""

    def written(*args, **kwargs):
        raise AssertionError("something was written")

    monkeypatch.setattr(torch, "save", written)
    monkeypatch.setattr(torch.distributed.checkpoint, "save", written)
    sharded = (*base, *SMALL, *SHARDED)
    whole, model_alone = (dry_run([*sharded, *more], H100, 4) for more in ((), ("--save_strategy", "no")))
    numbers = 4 * whole.parts_gb["moments"] / 8
    assert whole.checkpoint_gb == pytest.approx(16 * numbers, rel=0.02)
    assert whole.checkpoint_host_gb == pytest.approx(8 * numbers, rel=0.02)
    assert model_alone.checkpoint_gb == pytest.approx(4 * numbers, rel=0.02) == model_alone.checkpoint_host_gb
    largest = 2000 * 256 * 4 / 1e9  # is gathered beside weights and moments, and leaves for the host
    kept = whole.parts_gb["moments"] + whole.parts_gb["weights"]
    assert kept + largest < whole.checkpoint_peak_gb < kept + 2.5 * largest < whole.peak_gb
    of_last = dry_run(sharded, H100, 4, rank=3)
    assert of_last.checkpoint_gb == of_last.checkpoint_host_gb == 0


def test_an_adapters_checkpoint_holds_what_is_trained(base):
    lora = dry_run([*base, *SMALL, *SHARDED, "--lora_enable", "True"], H100, 4)
    trained = 4 * lora.parts_gb["moments"] / 8
    assert lora.checkpoint_gb == pytest.approx(16 * trained, rel=0.02)
    # The frozen weights are gathered with the others, and left out of the file.
    assert lora.checkpoint_host_gb == pytest.approx(4 * lora.parts_gb["weights"], rel=0.02)


def test_frozen_weights_are_held_once(base):
    """Two bytes each in half precision; only what is trained has masters, and copies."""
    whole, lora = (dry_run([*base, *SMALL, *more], H100, 1).parts_gb for more in ((), ("--lora_enable", "True")))
    trained, frozen = lora["moments"] / 8, whole["moments"] / 8
    assert lora["weights"] == pytest.approx(2 * frozen + 4 * trained, rel=0.05)
    assert lora["gathered weights"] == pytest.approx(2 * trained, rel=0.1)
    sharded = dry_run([*base, *SMALL, *SHARDED, "--lora_enable", "True"], H100, 4).parts_gb
    assert sharded["weights"] == pytest.approx(lora["weights"] / 4, rel=0.05)


def test_without_sharding_each_gpu_holds_all_and_the_gradients_once_more(base):
    whole = ["--bf16", "False", "--per_device_train_batch_size", "2", "--model_max_length", "256", *ACCUMULATED]
    one, four = (dry_run([*base, *whole], H100, gpus) for gpus in (1, 4))
    assert four.parts_gb["moments"] == one.parts_gb["moments"]
    assert four.parts_gb["gradients, in DDP's buckets"] == pytest.approx(one.parts_gb["moments"] / 2, rel=0.01)
    assert four.peak_gb - one.peak_gb == pytest.approx(one.parts_gb["moments"] / 2, rel=0.1)
    assert four.samples_per_step == 4 * one.samples_per_step


def test_quantized_weights_take_their_bits(base):
    pytest.importorskip("bitsandbytes")
    lora = [*base, *SMALL, "--lora_enable", "True"]
    halves, eight, four = (dry_run([*lora, "--bits", bits], H100, 1).parts_gb["weights"] for bits in ("16", "8", "4"))
    numbers = 8 * (4 * 256**2 + 3 * 256 * 688) / 1e9  # of the layers' products; the rest is kept whole
    assert eight - four == pytest.approx(numbers / 2, rel=0.2)
    assert halves > eight > four


def test_weights_in_bf16_alone_take_six_bytes(base):
    """Two for the weight, two for its gradient, two for 8-bit moments with their scales."""
    pytest.importorskip("torchao")
    whole, alone = (dry_run([*base, *SMALL, *ACCUMULATED, *more], H100, 1) for more in ((), BF16_ALONE))
    two_bytes = whole.parts_gb["moments"] / 4
    assert alone.parts_gb["gradients"] == pytest.approx(two_bytes, rel=0.02)
    assert alone.parts_gb["moments"] == pytest.approx(two_bytes, rel=0.05)
    assert "gathered weights" not in alone.parts_gb and alone.host_syncs_per_step == whole.host_syncs_per_step
    # Its step is one compiled graph for each parameter.
    assert alone.bytes_per_step < whole.bytes_per_step


def test_adafactors_moments_are_rows_and_columns(base):
    adam, factored = (dry_run([*base, *SMALL, "--optim", name], H100, 1) for name in ("adamw_torch", "adafactor"))
    assert 0 < factored.parts_gb["moments"] < 0.1 * adam.parts_gb["moments"]


def test_a_budget_of_activations_trades_memory_for_arithmetic(base):
    packed = [*base, *SMALL, "--packing", "True", "--torch_compile", "True"]
    all_kept, some, none = (
        dry_run([*packed, "--activation_memory_budget", share], H100, 1) for share in ("1", "0.5", "0")
    )
    assert all_kept.parts_gb["activations"] > some.parts_gb["activations"] > none.parts_gb["activations"]
    assert all_kept.flops_per_step <= some.flops_per_step < none.flops_per_step


def test_what_is_not_counted_is_said(base):
    assert "--use_liger_kernel" in dry_run([*base, *SMALL, "--use_liger_kernel", "True"], H100, 1).notes[0]


def test_accumulation_repeats_the_middle(base):
    three, nine = (dry_run([*base, *SMALL, "--gradient_accumulation_steps", count], H100, 1) for count in ("3", "9"))
    assert nine.micro_batches == 9 and nine.samples_per_step == 3 * three.samples_per_step
    each = (nine.flops_per_step - three.flops_per_step) / 6
    assert each == pytest.approx(three.flops_per_step / 3, rel=1e-6)
    assert nine.peak_gb == pytest.approx(three.peak_gb)


def test_compiled_layers_keep_less_and_move_less(base):
    packed = [*base, *SMALL, "--packing", "True"]
    eager, compiled = (dry_run([*packed, "--torch_compile", text], H100, 1) for text in ("False", "True"))
    assert eager.mfu == eager.mfu_eager and compiled.mfu > eager.mfu and compiled.mfu_eager is None
    assert beside_eager(compiled, [*packed, "--torch_compile", "True"], H100, 1).mfu_eager == eager.mfu
    assert compiled.parts_gb["activations"] < eager.parts_gb["activations"]
    assert compiled.bytes_per_step < 0.8 * eager.bytes_per_step
    assert compiled.flops_per_step == pytest.approx(eager.flops_per_step, rel=1e-6)
    assert compiled.attention.startswith("packed")


def test_a_wait_is_counted_and_costs():
    tracker = Tracker(Clock(H100))
    with FakeTensorMode(), tracker:
        ones = torch.ones(1 << 24)
        before = tracker.clock.host
        (ones.sum() > 0).item()
    assert tracker.waits == Counter({"_local_scalar_dense": 1})
    assert tracker.clock.host >= tracker.clock.device > before


def test_the_host_is_what_many_small_kernels_wait_for():
    clock = Clock(H100)
    for _ in range(100):
        clock.run(Work(bytes=8, kernels=1))
    assert clock.now == pytest.approx(100 * 10e-6, rel=0.01)
    clock = Clock(H100)
    clock.run(Work(flops=660e12, kernels=1))
    assert clock.now == pytest.approx(1, rel=0.01)


def test_the_command_writes_flat_figures(base, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main([*base, *SMALL, "--gpu", "a100-40g", "--json", str(path), "--records", "100"]) == 0
    figures = json.loads(path.read_text())
    names = {"peak_gb", "parts_gb", "fits", "mfu", "mfu_eager", "step_seconds", "tokens_per_second", "attention",
             "host_syncs_per_micro_batch", "reduce_dtype", "flops_per_step", "bytes_per_step", "hours",
             "checkpoint_gb", "checkpoint_host_gb", "checkpoint_peak_gb"}  # fmt: skip
    assert names <= set(figures)
    assert isinstance(figures["host_syncs_per_micro_batch"], int) and figures["fits"] is True
    out = capsys.readouterr().out
    assert all(words in out for words in ("fullest", "optimizer's moments", "peak of each GPU", "0.1 GB on disk"))


def test_what_is_being_predicted_is_shown_on_stderr(base, capsys, monkeypatch):
    reached = []

    class Watched(tqdm):
        def close(self):
            if not self.disable:
                reached.append((self.desc, self.n == self.total))
            super().close()

    monkeypatch.setattr(module, "tqdm", Watched)
    monkeypatch.setitem(GPUS, "h100", replace(H100, memory_gb=1.3))
    assert main([*base, *SMALL, *ACCUMULATED, *COMPILED]) == 1
    said = capsys.readouterr()
    titles = ["predicting", "predicting, nothing compiled", "predicting what would help"]
    assert list(dict(reached)) == titles and all(full for _, full in reached)
    assert [title for title in titles if f"{title}:   0%" in said.err] == titles
    assert "predicting" not in said.out


def test_what_does_not_fit_comes_with_flags_that_do(base, capsys, monkeypatch):
    whole = dry_run([*base, *SMALL], H100, 1)
    small = replace(H100, memory_gb=(whole.peak_gb - 0.005) * 1.05 + 1.2)
    monkeypatch.setitem(GPUS, "h100", small)
    assert main([*base, *SMALL]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"does not fit: it takes {whole.peak_gb:.1f} GB; ") and out.count("does not fit") == 1
    assert "--gradient_checkpointing True" in out.split(HEADING)[1] and ", fits" in out


def test_what_helps_is_half_precision_first_and_nothing_is_said_of_a_run_that_isnt(base, capsys, caplog, monkeypatch):
    """Nobody gave --keep_half_weights, and no file is saved: a log that says so would only raise questions."""
    flags = [*SMALL[2:]]
    assert SMALL[:2] == ("--bf16", "True")
    monkeypatch.setitem(GPUS, "h100", replace(H100, memory_gb=1.3))
    with caplog.at_level(logging.INFO):
        assert main([*base, *flags]) == 1
    said = capsys.readouterr()
    assert said.out.split(HEADING)[1].split()[:2] == ["--bf16", "True"]
    logged = caplog.text + said.err
    assert not any(word in logged for word in ("keep_half_weights", "Saving", "saved", "FSDP")), logged


def test_no_try_warns_of_a_flag_that_nobody_gave(base, capsys, caplog, monkeypatch):
    """Adapters on 4-bit weights aren't gathered, so that --keep_half_weights, which is tried, does nothing."""
    monkeypatch.setitem(GPUS, "h100", replace(H100, memory_gb=1.3))
    with caplog.at_level(logging.INFO):
        assert main([*base, *SMALL, "--lora_enable", "True"]) == 1
    assert "--keep_half_weights" not in caplog.text
    assert capsys.readouterr().out.startswith("does not fit: ")


def test_a_gpu_is_found_by_its_common_names():
    assert find_gpu("RTX 3090") is find_gpu("rtx3090") is GPUS["3090"]
    assert find_gpu("A10").name == "a10" and find_gpu("NVIDIA RTX-A6000").name == "a6000"
    parser = " ".join(build_parser().format_help().split())
    assert all(name in parser for name in GPUS)


@pytest.mark.parametrize(("memory", "last"), [(1.3, "--optim adamw_torch_8bit"), (0.9, "--lora_enable True")])
def test_a_flag_that_says_false_is_no_flag(base, capsys, monkeypatch, memory, last):
    if "8bit" in last:
        pytest.importorskip("torchao", reason="8-bit moments are offered where torchao is installed")
    monkeypatch.setitem(GPUS, "h100", replace(H100, memory_gb=memory))
    assert main([*base, *SMALL[2:], "--bf16", "False", "--tune_mm_mlp_adapter", "False"]) == 1
    tried = capsys.readouterr().out.split(HEADING)[1]
    assert tried.split()[:2] == ["--bf16", "True"] and last in tried


@pytest.mark.parametrize("name", ["v100-16g", "t4"])
def test_a_gpu_without_bfloat16_is_offered_fp16(base, capsys, monkeypatch, name):
    monkeypatch.setitem(GPUS, name, replace(GPUS[name], memory_gb=1.3))
    assert main([*base, *SMALL[2:], "--gpu", name]) == 1
    assert capsys.readouterr().out.split(HEADING)[1].split()[:2] == ["--fp16", "True"]


def test_refusals(base):
    with pytest.raises(LlavaError, match="--gpu b200: unknown; use one of a100-40g"):
        main([*base, "--gpu", "b200"])
    with pytest.raises(LlavaError, match="no such folder, and none of llama-7b, llama-13b, mistral-7b"):
        dry_run(["--model_name_or_path", "/nowhere/at/all"], H100, 1)
    with pytest.raises(LlavaError, match="--model_name_or_path is needed"):
        dry_run([*SMALL], H100, 1)
    with pytest.raises(LlavaError, match="unknown argument"):
        dry_run([*base, "--no_such_flag", "1"], H100, 1)
    assert not gpu.is_described() and not torch.distributed.is_initialized()


def test_gpus_are_known_by_whole_words():
    assert peak_of("NVIDIA A100-SXM4-40GB") == 312
    assert peak_of("NVIDIA L40S") == 362 and peak_of("NVIDIA L40") == 181 and peak_of("NVIDIA L4") == 121
    assert peak_of("NVIDIA GH200 480GB") is None and peak_of("NVIDIA A10G") == 70
    assert peak_of("NVIDIA H100 80GB HBM3") == GPUS["h100"].peak_tflops
    assert peak_of("NVIDIA H100 PCIe") == 756 and peak_of("NVIDIA H100 NVL") == 835
    assert peak_of("Tesla V100-SXM2-32GB") == 125 and peak_of("Tesla V100-PCIE-16GB") == 112
    assert peak_of("NVIDIA GeForce RTX 3090") == 71 and peak_of("NVIDIA GeForce RTX 3090 Ti") == 80
    assert peak_of("NVIDIA GeForce RTX 4090 Laptop GPU") is None and peak_of("NVIDIA GeForce RTX 4090 D") is None


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "memory", "mfu"),
    [((), 72.1, 0.392), (("--torch_compile", "True"), 68.7, 0.486)],
)
def test_what_an_h100_measured(tmp_path, flags, memory, mfu):
    """docs/benchmarks.md: 15 layers of a 7B, packed to 4096; there the tower had next to no weights, as here."""
    sizes = {"vocab_size": 32003, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 15} | sizes))
    (tmp_path / "tower").mkdir()
    tower = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "image_size": 224,
             "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
    (tmp_path / "tower/config.json").write_text(json.dumps(tower))
    argv = ["--model_name_or_path", str(tmp_path / "llm"), "--vision_tower", str(tmp_path / "tower")]
    argv += ["--bf16", "True", "--packing", "True", "--max_tokens_per_batch", "4096"]
    prediction = dry_run([*argv, "--gradient_accumulation_steps", "4", *flags], H100, 1)
    assert prediction.peak_gb == pytest.approx(memory, rel=0.02)
    assert prediction.mfu == pytest.approx(mfu, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "more", "memory", "mfu"),
    [("h100", BF16_ALONE, 74, 0.45), ("h200", ("--optim", "adamw_torch_8bit"), 138, 0.5)],
)
def test_a_whole_7b_on_one_gpu(name, more, memory, mfu):
    argv = ["--model_name_or_path", "llama-7b", "--bf16", "True", "--packing", "True", "--torch_compile", "True"]
    argv += ["--max_tokens_per_batch", "4096", "--gradient_accumulation_steps", "4"]
    prediction = dry_run([*argv, *more], GPUS[name], 1)
    assert prediction.peak_gb <= memory and prediction.fits and prediction.mfu >= mfu


@pytest.mark.long
def test_the_seeds_second_stage_fits_eight_a100_of_40_gb():
    argv = ["--model_name_or_path", "llama-7b", *SHARDED, *SAVING, "--bf16", "True", "--model_max_length", "2048"]
    argv += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8"]
    prediction = dry_run(argv, GPUS["a100-40g"], 8)
    assert prediction.peak_gb <= 24 and prediction.fits
    assert prediction.parts_gb["moments"] == pytest.approx(8 * 6.74 / 8, rel=0.02)


def test_sharding_divides_weights_among_the_gpus(base, tmp_path):
    weights = {}
    for count in ("2", "4"):
        path = tmp_path / f"{count}.json"
        assert main([*base, *SMALL, *SHARDED, "--gpu", "h100", "--gpus", count, "--json", str(path)]) == 0
        weights[count] = json.loads(path.read_text())["parts_gb"]["weights"]
    # The frozen tower is sharded too; what is gathered to compute with counts apart.
    assert weights["2"] == pytest.approx(2 * weights["4"], rel=0.02)


def test_a_run_needs_a_gpu_at_least(base):
    with pytest.raises(LlavaError, match="--gpus 0"):
        main([*base, "--gpus", "0"])
