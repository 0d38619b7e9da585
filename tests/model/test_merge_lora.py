"""consolidate, merge_lora, extract_mm_projector and quantize: what they write is what was there."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llava.errors import LlavaError
from llava.model import consolidate, extract_mm_projector, load_pretrained_model, merge_lora, quantize
from llava.model.convert.hf_writer import export_hf
from llava.model.weights import shards
from llava.model.weights.files import WeightFiles
from llava.records import read_json, write_json
from tests.tiny import make_llava, make_llm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "llama", mm_projector_type="mlp2x_gelu")


@pytest.fixture(scope="module")
def lora(llava, tmp_path_factory) -> Path:
    """An adapter over the plain language model with a trained projector beside it, as LLaVA's training writes it."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    loaded = load_pretrained_model(llava, device="cpu")
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(loaded.model, settings)
    model.peft_config["default"].base_model_name_or_path = str(llava.parent / "llm")
    model.save_pretrained(folder)
    loaded.model.config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    trained = {name: tensor + 0.5 for name, tensor in model.state_dict().items() if "mm_projector" in name}
    torch.save(trained, folder / "non_lora_trainables.bin")
    return folder


def logits(loaded) -> torch.Tensor:
    ids = torch.tensor([[1, *[-200] * loaded.model.num_patches, 5, 6, 7]])
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        return loaded.model(input_ids=ids, pixel_values=pixels).logits


def test_merged_weights_are_adapter_plus_base(llava, lora, tmp_path, capsys):
    target = tmp_path / "merged"
    base = llava.parent / "llm"
    merge_lora.main(["--model-path", str(lora), "--model-base", str(base), "--save-model-path", str(target)])
    assert "complete and verified" in capsys.readouterr().out
    merged, plain = WeightFiles.of_folder(target), WeightFiles.of_folder(base)
    adapter = WeightFiles([lora / "adapter_model.safetensors"])
    extra = WeightFiles([lora / "non_lora_trainables.bin"])
    changed = 0
    for name in plain:
        expected = plain.read(name).clone()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            changed += 1
            expected += 2 * adapter.read(f"{key}.lora_B.weight") @ adapter.read(f"{key}.lora_A.weight")
        assert torch.allclose(merged.read(name), expected, atol=1e-6, rtol=0), name
    assert changed == 4
    for name in extra:
        assert torch.equal(merged.read(name.removeprefix("base_model.model.")), extra.read(name)), name
    assert any("vision_tower" in name for name in merged)
    over_base = load_pretrained_model(lora, base, device="cpu")
    assert torch.allclose(logits(load_pretrained_model(target, device="cpu")), logits(over_base), atol=1e-5)
    assert "research only" in (target / "README.md").read_text().lower()
    assert not (target / "adapter_config.json").exists()


def test_merge_takes_the_recorded_base_and_refuses_a_whole_model(llava, lora, tmp_path):
    merge_lora.main(["--model-path", str(lora), "--save-model-path", str(tmp_path / "merged")])
    load_pretrained_model(tmp_path / "merged", device="cpu")
    with pytest.raises(LlavaError, match="nothing to merge"):
        merge_lora.main(["--model-path", str(llava), "--save-model-path", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_merge_with_another_base_says_so(lora, tmp_path):
    make_llm(tmp_path / "small", hidden_size=16)
    arguments = ["--model-path", str(lora), "--model-base", str(tmp_path / "small")]
    with pytest.raises(LlavaError, match=r"shape|32"):
        merge_lora.main([*arguments, "--save-model-path", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


def test_consolidate_makes_a_folder_complete_in_itself(llava, tmp_path):
    """From `.bin` shards with the tower elsewhere to safetensors with the tower inside."""
    source = tmp_path / "source"
    source.mkdir()
    for path in llava.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            (source / path.name).write_bytes(path.read_bytes())
    config = read_json(source / "config.json")
    config["mm_vision_tower"] = str(llava.parent / "clip")
    del config["mm_vision_config"]
    write_json(source / "config.json", config)
    weights = WeightFiles.of_folder(llava)
    without = {name: weights.read(name).half() for name in weights if "vision_tower" not in name}
    torch.save(without, source / "pytorch_model.bin")
    consolidate.main(["--src", str(source), "--dst", str(tmp_path / "whole")])
    whole = WeightFiles.of_folder(tmp_path / "whole")
    assert all(torch.equal(whole.read(name), tensor) for name, tensor in without.items())
    tower = WeightFiles.of_folder(llava.parent / "clip")
    inside = [name for name in whole if "vision_tower" in name]
    assert len(inside) == len(tower)
    first, second = (
        load_pretrained_model(folder, device="cpu", dtype="float32") for folder in (source, tmp_path / "whole")
    )
    assert torch.equal(logits(first), logits(second))
    consolidate.main(["--src", str(source), "--dst", str(tmp_path / "wide"), "--dtype", "bfloat16"])
    wide = WeightFiles.of_folder(tmp_path / "wide")
    assert {wide.dtype(name) for name in wide} == {torch.bfloat16}


def test_extracted_projector_loads_over_the_language_model(llava, tmp_path, capsys):
    extract_mm_projector.main(["--model_name_or_path", str(llava), "--output", str(tmp_path / "mm_projector.bin")])
    assert "mm_projector.0.weight" in capsys.readouterr().out
    weights = WeightFiles.of_folder(llava)
    content = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert set(content) == {f"model.mm_projector.{n}.{leaf}" for n in (0, 2) for leaf in ("weight", "bias")}
    assert all(torch.equal(content[name], weights.read(name)) for name in content)
    before = sorted(path.name for path in llava.iterdir())
    with pytest.raises(LlavaError, match="the checkpoint itself; give another folder"):
        extract_mm_projector.main(["--model-path", str(llava), "--output", str(llava)])
    assert sorted(path.name for path in llava.iterdir()) == before
    extract_mm_projector.main(["--model-path", str(llava), "--output", str(tmp_path / "folder")])
    over_base = load_pretrained_model(
        tmp_path / "folder", llava.parent / "llm", vision_tower=llava.parent / "clip", device="cpu"
    )
    assert torch.equal(logits(over_base), logits(load_pretrained_model(llava, device="cpu")))


def test_a_merge_that_was_stopped_does_not_go_on_with_another_scale(llava, lora, tmp_path, monkeypatch):
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    words = ["--model-path", str(adapter), "--model-base", str(llava.parent / "llm"), "--save-model-path"]
    add = shards._Journal.add

    def add_and_stop(self, name, checksum):
        add(self, name, checksum)
        if "self_attn.q_proj" in name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards._Journal, "add", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            merge_lora.main([*words, str(tmp_path / "merged")])
    write_json(adapter / "adapter_config.json", read_json(adapter / "adapter_config.json") | {"lora_alpha": 80})
    for name in ("merged", "afresh"):
        merge_lora.main([*words, str(tmp_path / name)])
    found, expected = (WeightFiles.of_folder(tmp_path / name) for name in ("merged", "afresh"))
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected)


def test_a_projector_replaces_nothing_of_another_models_folder(llava, tmp_path):
    """Its configuration and tokenizer go along: the language model there would be one no more."""
    there = shutil.copytree(llava.parent / "llm", tmp_path / "llm")
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    words = ["--model-path", str(llava), "--output"]
    with pytest.raises(LlavaError, match=r"llm/\w+\.json is there and holds something else.*--overwrite"):
        extract_mm_projector.main([*words, str(there)])
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    extract_mm_projector.main([*words, str(tmp_path / "projector-v1.5")])
    assert (tmp_path / "projector-v1.5" / "mm_projector.bin").is_file()
    with pytest.raises(LlavaError, match=r"p\.pt: give a \.bin or \.safetensors file, or a folder"):
        extract_mm_projector.main([*words, str(tmp_path / "p.pt")])


def test_projector_of_other_layouts(llava, lora, tmp_path):
    weights = WeightFiles.of_folder(llava)
    name = "model.mm_projector.2.weight"
    export_hf(llava, tmp_path / "hf")
    for source, difference in ((tmp_path / "hf", 0), (lora, 0.5)):
        path = tmp_path / f"{source.name}.safetensors"
        extract_mm_projector.main(["--model-path", str(source), "--output", str(path)])
        assert torch.equal(WeightFiles([path]).read(name), weights.read(name) + difference)


def test_how_the_base_generates_is_kept(llava, lora, tmp_path):
    base = shutil.copytree(llava.parent / "llm", tmp_path / "llm")
    write_json(base / "generation_config.json", {"eos_token_id": [2, 7], "temperature": 0.3})
    export_hf(lora, tmp_path / "hf", base)
    merge_lora.main(["--model-path", str(lora), "--model-base", str(base), "--save-model-path", str(tmp_path / "m")])
    for folder in ("hf", "m"):
        kept = read_json(tmp_path / folder / "generation_config.json")
        assert (kept["eos_token_id"], kept["temperature"]) == ([2, 7], 0.3), folder


def test_projector_with_rows_of_image_tokens(tmp_path):
    llava = make_llava(tmp_path, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    extract_mm_projector.main(["--model-path", str(llava), "--output", str(tmp_path / "p.bin")])
    embedding = WeightFiles.of_folder(llava).read("model.embed_tokens.weight")
    rows = torch.load(tmp_path / "p.bin", weights_only=True)["model.embed_tokens.weight"]
    assert torch.equal(rows, embedding[-3:])


def test_no_projector_is_said(llava, tmp_path):
    with pytest.raises(LlavaError, match="plain language model"):
        extract_mm_projector.main(["--model-path", str(llava.parent / "llm"), "--output", str(tmp_path / "p.bin")])
    assert not (tmp_path / "p.bin").exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_reloads(processor, llava, tmp_path, bits):
    """The same answers as quantizing while loading; a fraction of the bytes."""
    quantize.main(["--model-path", str(llava), "--output", str(tmp_path / "q"), "--bits", str(bits), "--device", "cpu"])
    weights = WeightFiles.of_folder(tmp_path / "q")
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights.dtype(name) == (torch.int8 if bits == 8 else torch.uint8)
    assert weights.dtype("model.mm_projector.0.weight") == torch.float16
    stored = load_pretrained_model(tmp_path / "q", device="cpu", dtype="float32")
    on_the_fly = load_pretrained_model(llava, device="cpu", dtype="float32", load_8bit=bits == 8, load_4bit=bits == 4)
    plain = logits(load_pretrained_model(llava, device="cpu"))
    assert torch.allclose(logits(stored), logits(on_the_fly), atol=0.05, rtol=0)
    error = (logits(stored) - plain).abs().mean() / plain.abs().mean()
    assert 0 < error < (0.1 if bits == 8 else 0.5)
    assert f"{bits} bits" in (tmp_path / "q/README.md").read_text()
    with pytest.raises(LlavaError, match="already stored"):
        quantize.main(["--model-path", str(tmp_path / "q"), "--output", str(tmp_path / "again")])
    with pytest.raises(LlavaError, match="8 or 4 bits"):
        export_hf(tmp_path / "q", tmp_path / "hf")


def test_a_wrong_path_is_one_line(tmp_path):
    """Importing bitsandbytes adds nothing to it, whatever the processor."""
    pytest.importorskip("bitsandbytes")
    words = ["--model-path", str(tmp_path / "none"), "--output", str(tmp_path / "q")]
    done = subprocess.run([sys.executable, "-m", quantize.__name__, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: model not found: no folder {tmp_path / 'none'}"]


def test_a_projector_file_with_code_does_not_run(llava, tmp_path):
    import os

    flag = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {flag}",)

    (tmp_path / "p").mkdir()
    write_json(tmp_path / "p/config.json", read_json(llava / "config.json"))
    torch.save({"model.mm_projector.weight": Attack()}, tmp_path / "p/mm_projector.bin")
    with pytest.raises(LlavaError, match="could run code"):
        extract_mm_projector.main(["--model-path", str(tmp_path / "p"), "--output", str(tmp_path / "out.bin")])
    assert not flag.exists() and not (tmp_path / "out.bin").exists()


def test_errors_are_one_line(tmp_path):
    arguments = ["--src", tmp_path / "none", "--dst", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, ROOT / "llava/model/consolidate.py", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: model not found")
    assert "Traceback" not in done.stderr


def test_golden_lora_merges(golden_dir, tmp_path):
    """Merged with float32 and compared with the reference's merged weights, in each case of G3."""
    training = golden_dir / "G8_training"
    cases = sorted((golden_dir / "G3_llava_llama_lora").glob("*/merged_small_weights.npz"))
    assert cases
    for path in cases:
        adapter = next(path.parent.glob("*/adapter_config.json")).parent
        target = tmp_path / path.parent.name
        arguments = ["--model-path", adapter, "--model-base", training / "base_llama", "--save-model-path", target]
        arguments += ["--vision-tower", training / "clip_tower", "--dtype", "float32"]
        merge_lora.main(list(map(str, arguments)))
        merged, expected = WeightFiles.of_folder(target), np.load(path)
        for name in expected.files:
            assert np.abs(merged.read(name).numpy() - expected[name]).max() <= 1e-6, (path.parent.name, name)
