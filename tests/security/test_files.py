"""Checkpoints, archives and lists that would run code or write elsewhere (rows 6, 7, 8 and 13: CVE-2025-3677,
CVE-2025-32434, CVE-2026-24747, CVE-2007-4559, CVE-2025-4138, CVE-2025-4517).

What a command reads is attacked here through the command itself, and through the call that others make in its place.
More of the kind: tests/model/test_key_accounting.py, tests/data/test_download_archives.py, test_convert_captions.py.
"""

import importlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from llava.errors import LlavaError
from llava.model import apply_delta, load_pretrained_model
from llava.model.weights import locate
from tests.data.archive_server import ArchiveServer, Reply
from tests.model.checkpoints import Payload
from tests.tiny import make_llava


def run(module, *words):
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def proof(tmp_path):
    """The file that is there once code was run."""
    return tmp_path / "proof"


@pytest.fixture
def checkpoint(tmp_path):
    return make_llava(tmp_path / "tiny")


@pytest.fixture
def pickled(checkpoint, proof):
    """A checkpoint whose weights are a pickle that runs code."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save({**tensors, "more": Payload(proof)}, checkpoint / "pytorch_model.bin")
    return checkpoint


@pytest.fixture
def with_code(checkpoint, proof):
    """A checkpoint whose files name code that lies beside them, as the hub's do."""
    code = f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n"
    code += "from transformers import PretrainedConfig\n"
    code += "class Own(PretrainedConfig):\n    model_type = 'of-its-own'\n"
    (checkpoint / "code.py").write_text(code)
    names = ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor")
    for path in checkpoint.glob("*config.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "auto_map": dict.fromkeys(names, "code.Own")}))
    return checkpoint


def test_a_pickle_is_not_run(tmp_path, pickled, proof):
    done = run("llava.serve.model_worker", "--model-path", pickled, "--no-register", "--port", 1)
    assert done.returncode == 2 and "pytorch_model.bin: holds something other" in done.stderr, done.stderr
    with pytest.raises(LlavaError, match="holds something other"):
        apply_delta.main(["--base", str(pickled), "--target", str(tmp_path / "target"), "--delta", str(pickled)])
    assert not proof.exists() and not (tmp_path / "target").exists()


def test_code_beside_a_checkpoint_is_not_run(with_code, proof):
    assert load_pretrained_model(with_code, device="cpu").model is not None
    assert not proof.exists()


def test_loading_without_care_runs_a_pickle(pickled, proof):
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert proof.exists()


def test_loading_without_care_runs_code(with_code, proof, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps(config | {"model_type": "of-its-own"}))
    AutoConfig.from_pretrained(with_code, trust_remote_code=True)
    assert proof.exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", '"x"', "[1]", ""])
def test_an_absurd_config_is_one_clear_line(tmp_path, text):
    folder = tmp_path / "absurd"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(LlavaError, match=r"absurd.config\.json"):
        load_pretrained_model(folder, device="cpu")


def hostile_archive(outside) -> bytes:
    """A member that leads out by its name, and one that leads out through a link before it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name in (f"../{outside.name}", "PMC/image.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    return content.getvalue()


def test_an_archive_writes_nothing_outside(tmp_path):
    outside = tmp_path / "outside.jpg"
    with ArchiveServer() as server:
        server.pages["/evil"] = Reply(hostile_archive(outside))
        wanted = tmp_path / "wanted.jsonl"
        rows = [
            {"pair_id": str(number), "pmc_tar_url": server.url("/evil"), "image_file_path": path}
            for number, path in enumerate((f"../{outside.name}", "PMC/image.jpg"))
        ]
        wanted.write_text("".join(json.dumps(row) + "\n" for row in rows))
        target = tmp_path / "images"
        words = ["--oa-service", "", "--requests-per-second", 0, "--backoff", 0]
        run("llava.data.download_images", "--input_path", wanted, "--images_output_path", target, *words)
        assert server.requests["/evil"] == 1
    assert not outside.exists()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg")] == [Path("images/1.jpg")]


def test_unpacking_without_care_writes_outside(tmp_path):
    (tmp_path / "in").mkdir()
    outside = tmp_path / "outside.jpg"
    with tarfile.open(fileobj=io.BytesIO(hostile_archive(outside))) as archive:
        archive.extractall(tmp_path / "in", filter="fully_trusted")
    assert outside.read_bytes() == b"evil"


@pytest.fixture(params=["extract_mm_projector LICENSE", "export_hf tokenizer_config.json"])
def leaking(request, tmp_path, checkpoint):
    """A command, and the file of the checkpoint that is a link to one of the machine's."""
    module, name = request.param.split()
    private = tmp_path / "private.json"
    private.write_text('{"auths": "secret"}')
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(private)
    return [f"llava.model.{module}", "--model-path", checkpoint, "--output", tmp_path / "out"], name


def test_a_file_of_the_machine_is_not_taken_along(tmp_path, leaking):
    command, name = leaking
    done = run(*command)
    assert done.returncode == 2 and f"{name}: a link to {tmp_path / 'private.json'}, outside" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_look_at_links_it_is_taken_along(tmp_path, leaking, monkeypatch):
    (module, *words), name = leaking
    monkeypatch.setattr(locate, "_check_files", lambda folder: None)
    importlib.import_module(module).main([str(word) for word in words])
    assert "secret" in (tmp_path / "out" / name).read_text()
