"""Every tensor is accounted for: missing, extra, misshapen, damaged or hostile files are errors that name them."""

import json
import re
from pathlib import Path

import pytest
import torch

import llava
from llava.errors import LlavaError
from llava.model import build_model_from_llm, load_pretrained_model
from llava.model.towers.clip import CLIP_PREFIX
from tests.model.checkpoints import PROJECTOR, TOWER, Payload, Tiny, logits, save, write

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"), "llama", mm_projector_type="mlp2x_gelu")


def error(folder, base=None, **kwargs) -> str:
    with pytest.raises(LlavaError) as caught:
        load_pretrained_model(folder, base, device="cpu", **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (UP, "incomplete"),
        ("lm_head.weight", "incomplete"),
        ("model.mm_projector.2.bias", "projector"),
        (CLIP_PREFIX + "encoder.layers.1.mlp.fc1.bias", "whole vision model"),
    ],
)
def test_missing(tiny, tmp_path, name, cause):
    tensors = {key: tensor for key, tensor in tiny.tensors.items() if key != name}
    message = error(write(tmp_path / "a", tensors, tiny.config, tiny.folder))
    assert re.search(rf"missing tensor {re.escape(name)}; looked in .*a/model\.safetensors; likely .*{cause}", message)


@pytest.mark.parametrize(("kind", "dtype"), [("safetensors", torch.int32), ("bin", torch.int32), ("bin", torch.cfloat)])
def test_numbers_that_are_no_weights(tiny, tmp_path, kind, dtype):
    tensors = tiny.tensors | {UP: tiny.tensors[UP].to(dtype)}
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    message = error(write(tmp_path / "a", tensors, tiny.config, tiny.folder, name))
    assert re.search(rf"a/{name}: .*{re.escape(UP)}.* holds {dtype}", message)


def test_many_missing_are_counted(tiny, tmp_path):
    tensors = tiny.without("model.layers.1.")
    assert "(and 8 more)" in error(write(tmp_path / "a", tensors, tiny.config, tiny.folder))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("model.layers.2.mlp.up_proj.weight", "more layers"),
        ("model.mm_projector.4.weight", "mm_projector_type 'mlp2x_gelu'"),
        (CLIP_PREFIX + "encoder.layers.3.mlp.fc1.bias", "tower"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "LoRA adapter"),
        ("model.image_newline", "this is a LLaVA-NeXT"),
        ("model.strange", "config.json"),
    ],
)
def test_extra(tiny, tmp_path, name, cause):
    tensors = tiny.tensors | {name: torch.zeros(2)}
    message = error(write(tmp_path / "a", tensors, tiny.config, tiny.folder))
    assert re.search(rf"a/model\.safetensors: unexpected tensor {re.escape(name)} .*{cause}", message)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", CLIP_PREFIX + "embeddings.position_ids"]
)
def test_harmless_extras_are_ignored(tiny, tmp_path, name):
    folder = write(tmp_path / "a", tiny.tensors | {name: torch.ones(2)}, tiny.config, tiny.folder)
    load_pretrained_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("model.embed_tokens.weight", "tokens were added"),
        ("lm_head.weight", "tokens were added"),
        ("model.mm_projector.0.weight", "another tower or language model"),
        (CLIP_PREFIX + "embeddings.patch_embedding.weight", "another size of vision model"),
        (UP, "config.json"),
    ],
)
def test_misshapen(tiny, tmp_path, name, cause):
    tensor = tiny.tensors[name]
    tensors = tiny.tensors | {name: tensor[:-1].clone()}
    message = error(write(tmp_path / "a", tensors, tiny.config, tiny.folder))
    shapes = f"{[tensor.shape[0] - 1, *tensor.shape[1:]]}, but the model needs {list(tensor.shape)}"
    assert f"a/model.safetensors: {name} has shape {shapes}" in message
    assert cause in message


def test_rows_of_the_config_and_of_the_weights_must_agree(tiny, tmp_path):
    config = tiny.config | {"vocab_size": tiny.config["vocab_size"] + 3}
    assert "tokens were added" in error(write(tmp_path / "a", tiny.tensors, config, tiny.folder))


def test_tower_folder_without_a_block(tiny, tmp_path):
    tower = {name.removeprefix(CLIP_PREFIX): tensor for name, tensor in tiny.only(TOWER).items()}
    del tower["encoder.layers.0.mlp.fc1.bias"]
    clip = write(tmp_path / "clip", tower, json.loads((tiny.clip / "config.json").read_text()))
    folder = write(tmp_path / "a", tiny.without(TOWER), tiny.reference_config(mm_vision_tower=str(clip)), tiny.folder)
    message = error(folder)
    assert "fc1.bias" in message and str(clip / "model.safetensors") in message and "whole vision model" in message


def test_tower_not_found(tiny, tmp_path):
    config = tiny.reference_config(mm_vision_tower="./no-such-tower")
    assert "vision tower not found: no folder ./no-such-tower" in error(
        write(tmp_path / "a", tiny.without(TOWER), config, tiny.folder)
    )


def test_projector_of_another_shape(tiny, tmp_path):
    projector = {name: torch.zeros(3, *tensor.shape[1:]) for name, tensor in tiny.only(PROJECTOR).items()}
    folder = write(tmp_path / "a", projector, tiny.reference_config(), name="mm_projector.bin")
    message = error(folder, tiny.llm)
    assert re.search(r"a/mm_projector\.bin: model\.mm_projector\.0\.\w+ has shape \[3", message)
    assert "another tower or language model" in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.97])
def test_truncated(tiny, tmp_path, name, keep):
    folder = write(tmp_path / "a", tiny.tensors, tiny.config, tiny.folder, name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content))])
    message = error(folder)
    assert re.search(rf"a/{re.escape(name)}: can't be read as a weight file, perhaps it was cut off", message)


def test_missing_shard(tiny, tmp_path):
    folder = write(tmp_path / "a", None, tiny.config, tiny.folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "gone.safetensors"}}))
    assert "a/gone.safetensors: no such file, but model.safetensors.index.json lists it" in error(folder)


def test_index_that_leaves_the_folder(tiny, tmp_path):
    save(tiny.tensors, tmp_path / "outside.safetensors")
    folder = write(tmp_path / "a", None, tiny.config, tiny.folder)
    index = {"weight_map": dict.fromkeys(tiny.tensors, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lies outside the folder" in error(folder)


def test_shards_that_hold_the_same_tensor(tiny, tmp_path):
    folder = write(tmp_path / "a", None, tiny.config, tiny.folder)
    for name in ("a", "b"):
        save(tiny.tensors, folder / f"{name}.safetensors")
    half = len(tiny.tensors) // 2
    files = ["a.safetensors"] * half + ["b.safetensors"] * (len(tiny.tensors) - half)
    index = {"weight_map": dict(zip(tiny.tensors, files, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "both hold" in error(folder)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["whole", "projector", "adapter", "beside the adapter", "tower", "base"])
def test_code_in_a_pickle_is_not_run(tiny, tmp_path, place, legacy):
    proof = tmp_path / "proof"
    folder, base = tmp_path / "a", None
    config = tiny.reference_config()
    bad = {UP: torch.zeros(2), "x": Payload(proof)}
    lora = {f"base_model.model.{UP.removesuffix('.weight')}.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    if place == "whole":
        target = write(folder, None, config, tiny.folder) / "pytorch_model.bin"
    elif place == "projector":
        target, base = write(folder, None, config, tiny.folder) / "mm_projector.bin", tiny.llm
    elif place == "tower":
        tower = write(tmp_path / "clip", None, json.loads((tiny.clip / "config.json").read_text()))
        target = tower / "pytorch_model.bin"
        write(folder, tiny.without(TOWER), config | {"mm_vision_tower": str(tower)}, tiny.folder)
    else:
        write(folder, None, config, tiny.folder)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
        target, base = folder / "adapter_model.bin", tiny.llm
        if place == "beside the adapter":
            save(lora, target)
            target = folder / "non_lora_trainables.bin"
        elif place == "base":
            save(lora, target)
            base = write(tmp_path / "base", None, config)
            target = base / "pytorch_model.bin"
    torch.save(bad, target, _use_new_zipfile_serialization=not legacy)
    message = error(folder, base)
    assert not proof.exists()
    assert f"{target}: holds something other than tensors and was not loaded" in message
    # The file is what it claims to be: loaded without the precaution it would have run.
    torch.load(target, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize("place", ["model", "tower", "language model"])
def test_code_beside_a_checkpoint_is_not_imported(tiny, tmp_path, place):
    """`trust_remote_code` stays off: Python files that config or tokenizer name are data."""
    proof = tmp_path / "proof"
    folder = tiny.copy(tmp_path / "a")
    clip, llm = tmp_path / "clip", tmp_path / "llm"
    for source, target in ((tiny.clip, clip), (tiny.llm, llm)):
        write(target, None, None, source)
        for path in source.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    hostile = {"model": folder, "tower": clip, "language model": llm}[place]
    (hostile / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        path = hostile / name
        if path.exists():
            mapping = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
            mapping["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
            path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": mapping}))
    if place == "model":
        load_pretrained_model(folder, device="cpu")
    else:
        build_model_from_llm(llm, clip, device="cpu")
    assert not proof.exists()


def test_no_part_of_the_package_trusts_remote_code():
    found = []
    for path in sorted(Path(llava.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found += [f"{path}: {match}" for match in re.findall(r"trust_remote_code\s*=\s*(?!False)\S+", text)]
        found += [f"{path}: {match}" for match in re.findall(r"weights_only\s*=\s*False|pickle\.loads?\(", text)]
        found += [f"{path}: --trust-remote-code" for _ in re.findall(r"--trust[-_]remote[-_]code", text)]
    assert not found


def test_both_formats_of_one_model_load_the_safetensors(tiny, tmp_path):
    folder = tiny.copy(tmp_path / "a")
    (folder / "pytorch_model.bin").write_bytes(b"not even read")
    assert torch.equal(
        logits(load_pretrained_model(folder, device="cpu").model),
        logits(load_pretrained_model(tiny.folder, device="cpu").model),
    )
