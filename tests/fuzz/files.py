"""Files other than images, for the fuzzer: records, configurations, adapters, weights, tokenizers, request bodies."""

import functools
import io
import json
import struct
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava.errors import LlavaError
from tests.fuzz.harness import Target
from tests.fuzz.mutations import mutate, mutate_json

_RECORDS = [
    {
        "id": f"r{number}",
        "image": f"{number}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nIs there a nodule?"},
            {"from": "gpt", "value": "Yes, in the left upper lobe."},
        ],
        **({"options": ["yes", "no"]} if number % 2 else {}),
    }
    for number in range(4)
]


@functools.cache
def _folder() -> Path:
    """For the whole process; what is in it goes with it."""
    _folder.holder = tempfile.TemporaryDirectory()
    return Path(_folder.holder.name)


def _put(path: Path, content: bytes) -> Path:
    """A new file: the old one may still be mapped into memory."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def _records(suffix: str) -> Target:
    from llava.data.validate import Report, validate
    from llava.record_content import read_dialogue, record_images, record_options
    from llava.records import iter_records, write_records
    from llava.train.data.record_store import open_records

    path = _folder() / f"records{suffix}"
    write_records(path, [{**record, "images": None} for record in _RECORDS])
    sound = path.read_bytes()
    files = [("", sound), ("", sound[: len(sound) // 2] + sound[len(sound) // 2 :].replace(b"r3", b"r4"))]

    def read(_: str, content: bytes) -> None:
        _put(path, content)
        for unpacked in _folder().glob("*.arrow"):
            unpacked.unlink()
        deque(validate(path, Report()), maxlen=0)
        store = open_records(path, _folder())
        for records in (iter_records(path), (store[number] for number in range(len(store)))):
            for record in records:
                for look in (record_images, record_options, read_dialogue):
                    look(record)

    return Target(files, read, _change_lines if suffix == ".jsonl" else _CHANGES[suffix], (LlavaError,))


def _change_lines(content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    lines = content.splitlines()
    place = generator.integers(len(lines))
    lines[place] = mutate_json(lines[place], lines[0], generator)
    return b"\n".join(lines)


_CHANGES = {".json": mutate_json, ".parquet": mutate}


def _configs() -> Target:
    from llava.model import load_pretrained_model
    from llava.model.export_hf import main as export
    from tests.tiny import make_llava

    folders = {name: _folder() / name for name in ("llama", "mistral", "hf")}
    for name in ("llama", "mistral"):
        folders[name] = make_llava(folders[name], name)
    export(["--model-path", str(folders["mistral"]), "--output", str(folders["hf"])])
    files = [(name, (folder / "config.json").read_bytes()) for name, folder in folders.items()]

    def read(name: str, content: bytes) -> None:
        _put(folders[name] / "config.json", content)
        load_pretrained_model(folders[name], device="cpu")

    return Target(files, read, mutate_json, (LlavaError,))


def _adapters(what: str) -> Target:
    import torch
    from safetensors.torch import save

    from llava.model.checkpoint.adapter import LoraAdapter

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"q_proj": 3, "a|b": 5}, "bias": "none"}
    config |= {"init_lora_weights": True, "use_dora": False, "layers_to_transform": None, "target_modules": ["q_proj"]}
    config |= {"rank_pattern": {}, "fan_in_fan_out": False, "base_model_name_or_path": "base", "use_rslora": False}
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(6, 2)}
    tensors["base_model.model.lm_head.weight"] = torch.ones(4, 8)
    sound = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}

    def read(_: str, content: bytes) -> None:
        for file, own in sound.items():
            _put(_folder() / file, content if file == what else own)
        adapter = LoraAdapter(_folder())
        for weight in adapter.adds_to:
            adapter.merged(weight, torch.zeros(6, 8))
        for file_name in adapter.overrides.values():
            adapter.weights.read(file_name)

    change = mutate_json if what.endswith(".json") else _change_header
    return Target([("", sound[what])], read, change, (LlavaError,))


def _weights() -> Target:
    import torch
    from safetensors.torch import save

    from llava.model.weights.files import WeightFiles

    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {f"layers.{place}.weight": torch.ones(3, 4).to(kind) for place, kind in enumerate(kinds)}
    path = _folder() / "model.safetensors"

    def read(_: str, content: bytes) -> None:
        weights = WeightFiles([_put(path, content)])
        for name in weights:
            weights.shape(name), weights.dtype(name)
            read, copied = (tensor.reshape(-1).view(torch.uint8) for tensor in (weights.read(name), weights.copy(name)))
            assert torch.equal(read, copied)

    return Target([("", save(tensors, {"format": "pt"}))], read, _change_header, (LlavaError,))


def _change_header(content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """Of a safetensors file: its header as JSON, or bytes anywhere."""
    if generator.random() < 0.4:
        return mutate(content, other, generator)
    (length,) = struct.unpack_from("<Q", content)
    header = mutate_json(content[8 : 8 + length], other[8:], generator)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _tokenizers() -> Target:
    import sentencepiece

    from llava.model.tokenizer import load_tokenizer
    from tests.tiny import CORPUS, make_tokenizer
    from tests.tokenization.made_tokenizers import byte_level, unigram

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split(". ") * 3), model_writer=stream, model_type="bpe", vocab_size=400,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 2048}
    special |= {"added_tokens_decoder": {"400": {"content": "<im>", "lstrip": False, "special": True}}}
    made = {"plain": make_tokenizer(_folder() / "plain"), "bytes": byte_level(True), "unigram": unigram(True)}
    sound: dict[str, dict[str, bytes]] = {
        "piece": {"tokenizer.model": stream.getvalue(), "tokenizer_config.json": json.dumps(special).encode()}
    }
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(_folder() / name)
        paths = [_folder() / name / file for file in ("tokenizer.json", "tokenizer_config.json")]
        sound[name] = {path.name: path.read_bytes() for path in paths if path.is_file()}
    files = [(f"{name}/{file}", content) for name, own in sound.items() for file, content in own.items()]

    def read(place: str, content: bytes) -> None:
        name, file = place.split("/")
        (_folder() / name).mkdir(exist_ok=True)
        for one, own in sound[name].items():
            _put(_folder() / name / one, content if one == file else own)
        tokenizer = load_tokenizer(_folder() / name)
        assert isinstance(tokenizer.encode("A chest X-ray.\n<image> is shown"), list)

    def change(content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
        return (mutate_json if content[:1] == b"{" else mutate)(content, other, generator)

    return Target(files, read, change, (LlavaError,))


_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_COMMON = {"model": "m", "temperature": 0.2, "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["x"], "stream": False}
_ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [_IMAGE, {"type": "text", "text": "?"}]},
]
_BODIES = {
    "chat": {**_COMMON, "messages": _ASKED, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 9},
    "tools": {"model": "m", "messages": _ASKED, "tools": [_TOOL], "tool_choice": "required"},
    "schema": {
        "model": "m",
        "messages": _ASKED,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    },
    "completions": {**_COMMON, "prompt": "<s>A chest", "logprobs": 1, "max_tokens": 5, "logit_bias": {"3": 5}},
    "responses": {"model": "m", "input": [{"role": "user", "content": "hi"}], "max_output_tokens": 16},
    "generate": {**_COMMON, "prompt": "<image>?", "images": ["iVBORw0KGgo="], "max_new_tokens": 4},
    "look": {"model": "m", "messages": _ASKED, "token_ids": [1, 2, 3]},
    "worker": {"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": ["m"], "speed": 1}},
}


def _bodies() -> Target:
    from llava.serve.api.chat import ChatRequest
    from llava.serve.api.completions import CompletionRequest
    from llava.serve.api.responses import ResponsesRequest
    from llava.serve.job import read_attention_map_request, read_job
    from llava.serve.protocol import ServeError
    from llava.serve.request_models import WorkerEntry
    from llava.serve.transport.bodies import parse_json, validated, written

    routes = dict.fromkeys(("chat", "tools", "schema"), ChatRequest)
    routes |= {"completions": CompletionRequest, "responses": ResponsesRequest, "worker": WorkerEntry}

    def read(name: str, content: bytes) -> None:
        body = parse_json(content)
        if name == "generate":
            read_job(body)
        elif name == "look":
            read_attention_map_request(body)
        else:
            request = validated(body, routes[name])
            if name != "worker":
                request.check()
                request.form("req-0123456789abcdef")
                for each in request.worker_bodies("req-0123456789abcdef"):
                    read_job(parse_json(json.dumps(each).encode()))
                    written(each)

    files = [(name, json.dumps(body).encode()) for name, body in _BODIES.items()]
    return Target(files, read, mutate_json, (ServeError,))


TARGETS: dict[str, Callable[[], Target]] = {
    "JSON": lambda: _records(".json"),
    "JSONL": lambda: _records(".jsonl"),
    "PARQUET": lambda: _records(".parquet"),
    "CONFIG": _configs,
    "ADAPTER_CONFIG": lambda: _adapters("adapter_config.json"),
    "ADAPTER": lambda: _adapters("adapter_model.safetensors"),
    "SAFETENSORS": _weights,
    "TOKENIZER": _tokenizers,
    "BODY": _bodies,
}
