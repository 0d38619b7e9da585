"""GGUF in and out on small random models: what is written is read back, and what can't be is refused in words.

tests/real compares with llama.cpp's own library.
"""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the extra gguf is not installed")
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from llava.errors import LlavaError
from llava.images import ImageProcessor
from llava.model.export_gguf import main as export_main
from llava.model.gguf.reader import import_gguf
from llava.model.gguf.writer import export_gguf
from llava.model.import_gguf import main as import_main
from llava.model.tokenizer import load_tokenizer
from llava.records import read_json
from tests.tiny import make_chat_llava, make_llava, make_tower

TEXTS = ("Is there a fracture?", "  a  12 b\n\n 345", "é 日本 <|im_start|>user\nyes<|im_end|>\n")
DINOV2_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}


@pytest.mark.parametrize("digits", [False, True], ids=["gpt-2", "digits apart"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_out_and_in_again(tied, digits, tmp_path):
    llava, llm = make_chat_llava(tmp_path, digits=digits, tied=tied)
    file = export_gguf(llava, tmp_path / "gguf", kind="f32") / "model-f32.gguf"
    back = import_gguf(file, tmp_path / "back")
    before, after = load_file(llm / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = load_tokenizer(llm), load_tokenizer(back)
    for text in TEXTS:
        assert new(text).input_ids == old(text).input_ids
        assert new.decode(new(text).input_ids) == text
    assert (new.bos_token_id, new.eos_token_id, new.pad_token_id) == (1, 2, 0)
    assert "<|im_start|>" in new.chat_template
    config = read_json(back / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["rms_norm_eps"]) == (1, 2, 1e-6)
    # The end of a turn ends an answer as the end of text does.
    assert read_json(back / "generation_config.json")["eos_token_id"] == 2
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (llm, back)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("kind", "dtype", "error"), [("f16", torch.float16, 1e-3), ("q8_0", torch.float32, 0.01),
                                                      ("q4_0", torch.float32, 0.13)])  # fmt: skip
def test_smaller_types(kind, dtype, error, tmp_path, capsys):
    llava, llm = make_chat_llava(tmp_path)
    export_main(["--model-path", str(llava), "--output", str(tmp_path / "gguf"), "--type", kind, "--vision-tower",
                 str(tmp_path / "clip")])  # fmt: skip
    import_main(["--model-path", str(tmp_path / "gguf" / f"model-{kind}.gguf"), "--output", str(tmp_path / "back")])
    assert "complete" in capsys.readouterr().out
    before, after = load_file(llm / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    for name in before:
        assert after[name].dtype == dtype
        assert (after[name].float() - before[name]).abs().max() <= error * before[name].abs().max()
    assert (tmp_path / "gguf" / "mmproj-f16.gguf").is_file()
    import_main(["--model-path", str(tmp_path / "gguf" / f"model-{kind}.gguf"), "--output", str(tmp_path / "back"),
                 "--overwrite", "--dtype", "bfloat16"])  # fmt: skip
    assert load_file(tmp_path / "back" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "BF16"])
def test_types_of_others_are_unpacked(kind, tmp_path):
    """The file as another program writes it: the same fields, other types."""
    llava, llm = make_chat_llava(tmp_path)
    source = export_gguf(llava, tmp_path / "gguf", kind="f32") / "model-f32.gguf"
    rewrite(source, tmp_path / "other.gguf", GGMLQuantizationType[kind])
    back = load_file(import_gguf(tmp_path / "other.gguf", tmp_path / "back") / "model.safetensors")
    before = load_file(llm / "model.safetensors")
    assert all((back[name].float() - before[name]).abs().max() <= 0.13 * before[name].abs().max() for name in before)
    assert back["model.embed_tokens.weight"].dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)


def test_what_lies_next_to_the_file_is_not_read(tmp_path):
    llava, _ = make_chat_llava(tmp_path)
    export_gguf(llava, tmp_path / "gguf", kind="f32")
    (tmp_path / "alone").mkdir()
    file = (tmp_path / "gguf" / "model-f32.gguf").rename(tmp_path / "alone" / "model-f32.gguf")
    expected = (import_gguf(file, tmp_path / "first") / "tokenizer.json").read_text()
    other = json.loads(expected)
    other["normalizer"] = {"type": "Lowercase"}
    (file.parent / "tokenizer.json").write_text(json.dumps(other))
    (file.parent / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/no/model"}))
    assert (import_gguf(file, tmp_path / "second") / "tokenizer.json").read_text() == expected


def rewrite(source, target, kind=None, leave_out=(), fields=(), tensors=()):
    """A copy of a file: matrices in another type, tensors left out or added, fields changed."""
    file, changed = GGUFReader(source), dict(fields)
    writer = GGUFWriter(target, changed.get("general.architecture", "llama"))
    for name, field in file.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changed:
            continue
        part = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=part)
    for name, value in changed.items():
        if name != "general.architecture":
            kinds = {str: writer.add_string, float: writer.add_float32}
            kinds.get(type(value), writer.add_uint32)(name, value)
    for tensor in file.tensors:
        if tensor.name in leave_out:
            continue
        matrix = len(tensor.shape) > 1 and kind is not None
        data = quants.quantize(tensor.data, kind) if matrix else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=kind if matrix else None)
    for name in tensors:
        writer.add_tensor(name, np.ones((64,), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensors": ["blk.0.attn_q.bias"]}, "1 tensors without a place .first blk.0.attn_q.bias"),
        ({"leave_out": ["blk.1.ffn_up.weight"]}, r"1 missing .first model.layers.1.mlp.up_proj.weight"),
        ({"fields": {"general.architecture": "gemma3"}}, "architecture 'gemma3'"),
        ({"fields": {"llama.expert_count": 4}}, "mixture of 4 experts"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
        ({"fields": {"tokenizer.ggml.eos_token_id": 9999}}, "eos_token_id is 9999, but there are"),
        ({"tensors": ["rope_freqs.weight"]}, "rope_freqs.weight aren't the factors"),
        ({"fields": {"llama.block_count": 1_000_000}}, "block_count is 1000000, but there are tensors of 2 blocks"),
        ({"fields": {"tokenizer.ggml.eos_token_id": "x"}}, "other.gguf: .*can't be read|imported"),
        ({"fields": {"llama.context_length": "long"}}, "other.gguf: .*can't be read"),
        ({"fields": {"llama.attention.head_count": 0}}, "other.gguf: .*can't be read"),
        ({"fields": {"llama.rope.scaling.factor": "q"}}, "other.gguf: no language model that can be imported"),
    ],
    ids=[
        "extra tensor",
        "missing tensor",
        "architecture",
        "experts",
        "yarn",
        "token",
        "factors",
        "blocks",
        "text as token",
        "text as length",
        "no heads",
        "text as factor",
    ],
)
def test_what_would_not_be_the_same_is_refused(changes, words, tmp_path):
    source = export_gguf(make_chat_llava(tmp_path)[0], tmp_path / "gguf", kind="f32") / "model-f32.gguf"
    rewrite(source, tmp_path / "other.gguf", **changes)
    with pytest.raises(LlavaError, match=words):
        import_gguf(tmp_path / "other.gguf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"PK\x03\x04" + b"\0" * 100, None], ids=["empty", "cut", "zip", "half"]
)
def test_files_that_are_none(content, tmp_path):
    if content is None:
        whole = export_gguf(make_chat_llava(tmp_path)[0], tmp_path / "gguf", kind="f32") / "model-f32.gguf"
        content = whole.read_bytes()[:-5000]
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(LlavaError, match=r"broken\.gguf: .*can't be read|broken\.gguf: no GGUF file"):
        import_gguf(tmp_path / "broken.gguf", tmp_path / "back")


def text(word):
    return struct.pack("<Q", len(word)) + word


def listed(kind, count, content=b""):
    """A file of one field, which is a list."""
    return b"GGUF" + struct.pack("<LQQ", 3, 0, 1) + text(b"a") + struct.pack("<LLQ", 9, kind, count) + content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (listed(0, 3 << 20, bytes(3 << 20)), "list entries"),
        (listed(10, 1000, bytes(64)), "cut off"),
        (listed(8, 1 << 20, bytes(1000)), "cut off"),
        (listed(9, 1, struct.pack("<LQ", 9, 1) * 60_000), "lists of lists"),
        (listed(99, 1, bytes(8)), "unknown type"),
        (b"GGUF" + struct.pack("<LQQ", 3, 0, 1 << 60), "fields"),
        (b"GGUF" + struct.pack("<LQQ", 3, 1 << 60, 0), "tensors"),
        (b"GGUF" + struct.pack("<LQQ", 3, 1, 0) + text(b"t") + struct.pack("<L", 1 << 31), "dimensions"),
        (b"GGUF" + struct.pack("<LQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60), "cut off"),
        (b"", "empty"),
    ],
)
def test_no_header_takes_memory_or_time(content, words, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(LlavaError, match=words):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_the_library_is_not_left_to_read_past_the_end(tmp_path):
    (tmp_path / "model.gguf").write_bytes(listed(0, 1 << 60, bytes(64)))
    words = ["llava.model.import_gguf", "--model-path", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "out")]
    # Without the look ahead it goes on until memory or time is at its end.
    limited = ["bash", "-c", 'ulimit -t 120; exec "$@"', "-", sys.executable, "-m", *words]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2 and "list entries" in done.stderr


def test_scaled_positions_come_back(tmp_path):
    """LLaMA-3.1's: a factor per frequency in the file, the rule that they follow in the folder."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    llava, llm = make_chat_llava(tmp_path, rope_parameters=rope, max_position_embeddings=131072)
    file = export_gguf(llava, tmp_path / "gguf", kind="f32") / "model-f32.gguf"
    back = import_gguf(file, tmp_path / "back")
    assert LlamaConfig.from_pretrained(back).rope_parameters == rope
    ids = torch.arange(3, 300)[None] % 400
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (llm, back)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}],
    ids=["as usual", "not normalised", "levels as they are", "twice as large"],
)
def test_pixel_values_are_the_processors_though_llama_cpp_always_normalises(settings, tmp_path):
    llava, _ = make_chat_llava(tmp_path)
    path = llava / "preprocessor_config.json"
    path.write_text(json.dumps(read_json(path) | settings))
    fields = GGUFReader(export_gguf(llava, tmp_path / "gguf") / "mmproj-f16.gguf").fields
    mean, std = (np.array(fields[f"clip.vision.image_{name}"].contents()) for name in ("mean", "std"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    theirs = (np.asarray(image) / 255 - mean) / std
    ours = ImageProcessor.from_pretrained(llava)(image)[0].transpose(1, 2, 0)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_positions_scaled_evenly_as_llama_cpp_reads_them(fields, factor, tmp_path):
    source = export_gguf(make_chat_llava(tmp_path)[0], tmp_path / "gguf", kind="f32") / "model-f32.gguf"
    rewrite(source, tmp_path / "other.gguf", fields={f"llama.{name}": value for name, value in fields.items()})
    rope = read_json(import_gguf(tmp_path / "other.gguf", tmp_path / "back") / "config.json")["rope_parameters"]
    assert rope.get("factor") == factor and rope["rope_type"] == ("linear" if factor else "default")


def test_dinov2_is_written_as_a_plain_vit(tmp_path):
    """The layer scale is in the output projections, position embeddings are those of the model's image size."""
    tower = make_tower(tmp_path / "dinov2", "dinov2", DINOV2_PROCESSOR, image_size=70, layerscale_value=0.3)
    llava, _ = make_chat_llava(tmp_path, tower=tower)
    weights = load_file(tower / "model.safetensors")
    files = [
        {t.name: t for t in GGUFReader(export_gguf(llava, tmp_path / token, kind="f32", class_token=token)
                                       / "mmproj-f32.gguf").tensors}
        for token in ("first", "last")
    ]  # fmt: skip
    first, last = files
    assert not any("scale" in name or "mask" in name for name in first)
    found = next(value for name, value in weights.items() if "layer.0" in name and name.endswith("output.dense.weight"))
    np.testing.assert_allclose(first["v.blk.0.attn_out.weight"].data, 0.3 * found.numpy(), rtol=1e-6)
    positions = [file["v.position_embd.weight"].data for file in files]
    assert positions[0].shape == (5, 24)  # 28 px of 14, and the class token
    # Wider, with a block more, where the class token is behind (tests/model/test_gguf_tower.py).
    np.testing.assert_array_equal(np.roll(positions[0], -1, axis=0), positions[1][:, :24])
    assert first.keys() < last.keys()


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("qwen2", {}, "this is qwen2"),
        ("llama", {"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
        ("llama", {"mm_vision_select_feature": "cls_patch"}, "class token among the features"),
        ("llama", {"image_aspect_ratio": "anyres"}, "anyres"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(kind, fields, words, tmp_path):
    with pytest.raises(LlavaError, match=words):
        export_gguf(make_llava(tmp_path, kind, **fields), tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists() and not list(tmp_path.glob(".gguf*"))


def test_flags_of_the_export(tmp_path):
    llava, _ = make_chat_llava(tmp_path)
    flags = ["--model-path", str(llava), "--output", str(tmp_path / "gguf"), "--class-token", "last"]
    export_main(flags)
    with pytest.raises(LlavaError, match="isn't empty"):
        export_main(flags)
    export_main([*flags, "--overwrite", "--model-base", str(tmp_path / "llm")])
