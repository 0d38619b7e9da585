"""Each family of language models, with its embeddings tied or apart: trained, saved, loaded, answered, rewritten.

Tied means that the head is the embedding: one tensor in memory, one in every file.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from llava.conversation import get_template
from llava.errors import LlavaError
from llava.generation import Engine, Request, SamplingParams
from llava.model import load_pretrained_model, save_model
from llava.model.configuration import LlavaConfigFields
from llava.model.convert.delta import apply_delta, make_delta
from llava.model.convert.hf_reader import import_hf
from llava.model.convert.hf_writer import export_hf
from llava.model.convert.native_writer import write_native
from llava.model.convert.quantized_writer import quantize
from llava.model.families import EMBEDDING, FAMILIES, HEAD, decoder_layers, family_of
from llava.model.language_model import LlavaForCausalLM
from llava.records import read_json, write_json
from llava.train.train import train
from tests.tiny import make_clip, make_llava, make_llm
from tests.train.helpers import flags, make_records

CASES = {"llama": True, "qwen2": True, "qwen2 apart": False}
"""Whether embeddings are tied; LLaMA and Mistral with a head of its own are what most other tests have."""

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "pad_token_id")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory, data) -> Path:
    """A folder with `llm`, `clip` and `llava`, a LLaVA with two more tokens that was trained for two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    kind = request.param.partition(" ")[0]
    llm = make_llm(folder / "llm", kind, tie_word_embeddings=CASES[request.param])
    more = ("--vision_tower", str(make_clip(folder / "clip")), "--mm_use_im_start_end", "True", "--max_steps", "2")
    train(flags(folder / "llava", data, llm, *more, "--mm_projector_type", "mlp2x_gelu"))
    return folder


@pytest.fixture(scope="module")
def loaded(trained):
    return load_pretrained_model(trained / "llava", device="cpu")


def is_tied(folder: Path) -> bool:
    return read_json(folder / "config.json")["tie_word_embeddings"]


def assert_tied_as(trained: Path, folder: Path) -> None:
    """The head is in the files of `folder`, and apart in memory, only if it is of its own."""
    tied = is_tied(trained / "llm")
    model = load_pretrained_model(folder, device="cpu").model
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    names = [name for path in folder.glob("*.safetensors") for name in load_file(path)]
    assert any(name.endswith(HEAD) for name in names) != tied


def image(width=50, height=40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def logits(loaded) -> torch.Tensor:
    ids = torch.tensor([[7, *[-200] * loaded.model.num_patches, 300, 301, 302]])
    pixels = torch.from_numpy(loaded.image_processor(image()))
    with torch.no_grad():
        return loaded.model(input_ids=ids, pixel_values=pixels.float()).logits


def test_training_moves_weights_and_keeps_the_tie(trained, loaded):
    assert_tied_as(trained, trained / "llava")
    before, after = (load_file(trained / name / "model.safetensors") for name in ("llm", "llava"))
    rows = before[EMBEDDING].shape[0]
    assert after[EMBEDDING].shape[0] == rows + 2
    assert not torch.equal(after[EMBEDDING][:rows], before[EMBEDDING])
    family = family_of(loaded.model.config)
    assert list(decoder_layers(loaded.model)) == list(loaded.model.model.layers)
    assert loaded.model.config.conversation_template == family.training_template
    assert read_json(trained / "llava" / "config.json")["architectures"] == [family.model_class.__name__]


def test_engine_answers_as_the_model_alone(loaded):
    assert_engine_answers_as_the_model_alone(loaded, family_of(loaded.model.config).default_template)


def assert_engine_answers_as_the_model_alone(loaded, template):
    conversation = get_template(template)
    conversation.append_message(conversation.roles[0], "<image>\nWhat does the picture show?")
    request = Request(conversation, [image()], SamplingParams(max_new_tokens=8, ignore_eos=True))
    engine = Engine(loaded)
    answer = engine.generate([request])[0]
    ids = torch.from_numpy(engine.prompts.build(request).ids)[None]
    pixels = torch.from_numpy(loaded.image_processor(image()))
    expected = []
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(loaded.model(input_ids=ids, pixel_values=pixels).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
    assert list(answer.token_ids) == expected


@pytest.mark.parametrize("family", [phi3, qwen3], ids=["phi3", "qwen3"])
def test_what_is_inside_attention_is_the_familys_own(family, tmp_path):
    """Joined projections, norms of queries and keys: no family of the table has them, and the engine doesn't ask."""
    name = family.__name__.rpartition("modeling_")[2].title()
    config, model, core = (getattr(family, name + part) for part in ("Config", "ForCausalLM", "Model"))
    own_config = type("OwnConfig", (LlavaConfigFields, config), {"model_type": "own"})
    own_model = type("OwnModel", (LlavaForCausalLM, model), {"config_class": own_config, "core_class": core})
    loaded = load_pretrained_model(make_llava(tmp_path), device="cpu")
    whole = loaded.model.config
    fields = {name: getattr(whole, name) for name in (*SIZES, *LlavaConfigFields.__annotations__)}
    torch.manual_seed(0)
    assert_engine_answers_as_the_model_alone(loaded._replace(model=own_model(own_config(**fields)).eval()), "vicuna_v1")


def test_transformers_gives_the_same_logits_and_the_way_back_is_exact(trained, loaded, tmp_path):
    hf = export_hf(trained / "llava", tmp_path / "hf")
    model, info = LlavaForConditionalGeneration.from_pretrained(hf, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied(trained / "llm")
    pixels = AutoProcessor.from_pretrained(hf)(images=image(), text="<image>", return_tensors="pt")["pixel_values"]
    assert (pixels - torch.from_numpy(loaded.image_processor(image()))).abs().max() < 1e-5
    ids = torch.tensor([[7, *[model.config.image_token_id] * loaded.model.num_patches, 300, 301, 302]])
    with torch.no_grad():
        theirs = model.eval()(input_ids=ids, pixel_values=pixels).logits
    ours = logits(loaded)
    assert (theirs[..., : ours.shape[-1]] - ours).abs().max() < 1e-4
    assert_tied_as(trained, hf)
    back = import_hf(hf, tmp_path / "back")
    assert_tied_as(trained, back)
    first, second = (load_file(path / "model.safetensors") for path in (trained / "llava", back))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_adapter_and_its_sum_with_the_base(trained, data, tmp_path):
    base, adapter = trained / "llava", tmp_path / "lora"
    train(flags(adapter, data, base, "--lora_enable", "--lora_r", "4", "--max_steps", "2", "--learning_rate", "1e-2"))
    merged = write_native(adapter, tmp_path / "merged", base, description="Merged.")
    assert_tied_as(trained, merged)
    one = load_pretrained_model(adapter, base, device="cpu")
    tied = one.model.lm_head.weight is one.model.get_input_embeddings().weight
    assert tied == is_tied(trained / "llm")
    assert torch.equal(logits(one), logits(load_pretrained_model(merged, device="cpu")))
    assert not torch.equal(logits(one), logits(load_pretrained_model(base, device="cpu")))


def test_adapter_with_new_tokens_over_the_plain_language_model(trained, data, tmp_path):
    """peft writes both matrices whole where rows were added, tied or not."""
    more = ("--vision_tower", str(trained / "clip"), "--mm_use_im_start_end", "True", "--lora_enable")
    train(flags(tmp_path, data, trained / "llm", *more, "--max_steps", "1"))
    found = load_pretrained_model(tmp_path, trained / "llm", device="cpu").model
    rows = load_file(trained / "llm" / "model.safetensors")[EMBEDDING].shape[0]
    assert found.get_input_embeddings().weight.shape[0] == found.lm_head.weight.shape[0] == rows + 2
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == is_tied(trained / "llm")


def test_delta_and_its_sum_with_the_base(trained, tmp_path):
    for name in ("llm", "llava"):
        (tmp_path / name).mkdir()
        for path in (trained / name).iterdir():
            if path.is_file():
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
        path = tmp_path / name / "model.safetensors"
        tensors = {key: tensor.half() for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    make_delta(tmp_path / "llm", tmp_path / "llava", tmp_path / "delta")
    applied = apply_delta(tmp_path / "llm", tmp_path / "applied", tmp_path / "delta")
    assert_tied_as(trained, applied)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("llava", "applied"))
    assert set(first) == set(second)
    assert all(torch.allclose(first[name], second[name], atol=2e-3) for name in first)


def test_eight_bits(trained, tmp_path):
    pytest.importorskip("bitsandbytes")
    stored = quantize(trained / "llava", tmp_path / "8bit", 8, device="cpu", dtype="float32")
    assert_tied_as(trained, stored)
    exact, found = (logits(load_pretrained_model(folder, device="cpu")) for folder in (trained / "llava", stored))
    assert torch.nn.functional.cosine_similarity(exact.flatten(), found.flatten(), dim=0) > 0.98


def test_projector_over_its_language_model(trained, data, tmp_path):
    """Stage 1 leaves rows of the embedding with the projector; a tied head follows them."""
    stage1 = tmp_path / "stage1"
    more = ("--vision_tower", str(trained / "clip"), "--tune_mm_mlp_adapter", "True", "--version", "plain")
    train(flags(stage1, data, trained / "llm", *more, "--mm_use_im_start_end", "True", "--max_steps", "2"))
    assert_tied_as(trained, stage1)
    projector = tmp_path / "projector"
    projector.mkdir()
    for path in stage1.iterdir():
        if path.suffix == ".json" or path.name == "mm_projector.bin":
            (projector / path.name).write_bytes(path.read_bytes())
    found = load_pretrained_model(projector, trained / "llm", device="cpu").model
    whole = load_pretrained_model(stage1, device="cpu").model
    assert torch.equal(found.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == is_tied(trained / "llm")


@pytest.fixture
def tied(trained, tmp_path) -> Path:
    """A copy of `trained` whose files may be changed."""
    if not is_tied(trained / "llm"):
        pytest.skip("the head is of its own")
    for name in ("llm", "llava"):
        (tmp_path / name).mkdir()
        for path in (trained / name).iterdir():
            if path.is_file():
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    return tmp_path


def add_head(folder: Path, more: float = 0.0) -> dict[str, torch.Tensor]:
    """Put a head into the file beside the embedding that it is tied to; returns the tensors before."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {HEAD: tensors[EMBEDDING] + more}, path, metadata={"format": "pt"})
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def test_a_head_beside_the_embedding_it_is_tied_to_is_left_out(tied):
    before = [add_head(tied / name) for name in ("llm", "llava")][1]
    model = load_pretrained_model(tied / "llava", device="cpu").model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    hf = export_hf(tied / "llava", tied / "hf")
    tensors = load_file(hf / "model.safetensors")
    assert not any(name.endswith(HEAD) for name in tensors)
    embedding = tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors | {"language_model.lm_head.weight": embedding.clone()}, hf / "model.safetensors")
    back = load_file(import_hf(hf, tied / "back") / "model.safetensors")
    assert set(back) == set(before) and all(torch.equal(back[name], before[name]) for name in before)
    make_delta(tied / "llm", tied / "llava", tied / "delta", dtype=torch.float32)
    applied = load_file(apply_delta(tied / "llm", tied / "applied", tied / "delta") / "model.safetensors")
    assert set(applied) == set(before)


def test_another_head_than_the_embedding_it_is_tied_to_is_refused(tied):
    tensors = add_head(tied / "llava", more=1.0)
    words = r"model\.safetensors: lm_head\.weight isn't the embedding.*tie_word_embeddings"
    for use in (
        lambda: load_pretrained_model(tied / "llava", device="cpu"),
        lambda: export_hf(tied / "llava", tied / "hf"),
        lambda: make_delta(tied / "llm", tied / "llava", tied / "delta"),
    ):
        with pytest.raises(LlavaError, match=words):
            use()
    config = tied / "llava" / "config.json"
    write_json(config, read_json(config) | {"tie_word_embeddings": False})
    assert torch.equal(load_pretrained_model(tied / "llava", device="cpu").model.lm_head.weight, tensors[EMBEDDING] + 1)
    with pytest.raises(LlavaError, match="the base's head is its embedding"):
        make_delta(tied / "llm", tied / "llava", tied / "delta")


def test_gathered_states_are_saved_without_the_copy(tied):
    loaded = load_pretrained_model(tied / "llava", device="cpu")
    state = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    assert HEAD in state
    save_model(tied / "saved", loaded.model, loaded.tokenizer, loaded.image_processor, state_dict=state)
    assert HEAD not in load_file(tied / "saved" / "model.safetensors")


def test_an_adapter_on_the_tied_head_is_refused(tied):
    loaded = load_pretrained_model(tied / "llava", device="cpu")
    model = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["lm_head"]))
    model.save_pretrained(tied / "adapter")
    loaded.model.config.save_pretrained(tied / "adapter")
    with pytest.raises(LlavaError, match=r"changes lm_head\.weight, which is the embedding"):
        load_pretrained_model(tied / "adapter", tied / "llava", device="cpu")


def test_rows_of_the_table_are_whole():
    for family in FAMILIES:
        assert {get_template(name).name for name in (family.default_template, family.training_template)}
        assert family.model_class.config_class is family.config_class
        assert issubclass(family.config_class, family.text_config_class)
