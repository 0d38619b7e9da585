"""Delta weights: what doesn't fit is said before any work, what fails leaves nothing, what was killed goes on."""

import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.folders import part_of, stage
from llava.model import apply_delta as apply_delta_command
from llava.model import load_pretrained_model
from llava.model import make_delta as make_delta_command
from llava.model.convert import delta as delta_module
from llava.model.convert.delta import apply_delta, make_delta
from llava.model.weights import shards
from llava.model.weights.files import WeightFiles
from llava.records import read_json, write_json
from tests.tiny import make_llava, make_llm


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama")


def make_pair(folder: Path, kind: str) -> Path:
    """`llm` (base), `llava` (a LLaVA on it with three more tokens, float16) and their `delta` in `folder`."""
    fields = {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}
    make_llava(folder, kind, **fields)
    for name in ("llm", "llava"):
        path = folder / name / "model.safetensors"
        tensors = {key: tensor.half() for key, tensor in load_file(path).items()}
        if name == "llava":
            torch.manual_seed(5)
            for key, tensor in tensors.items():
                if not key.startswith("model.vision_tower"):
                    tensor += (torch.randn(tensor.shape) * 1e-3).half()
        save_file(tensors, path, metadata={"format": "pt"})
    make_delta(folder / "llm", folder / "llava", folder / "delta")
    return folder


@pytest.fixture
def work(made, tmp_path) -> Path:
    for name in ("llm", "llava", "delta"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def assert_applied(folder: Path, target: Path) -> None:
    """`target` is fp16(delta + base) in every tensor, and loads."""
    base, delta, result = (WeightFiles.of_folder(path) for path in (folder / "llm", folder / "delta", target))
    assert set(result) == set(delta)
    for name in result:
        expected = delta.read(name).clone()
        if name in base:
            rows = base.shape(name)[0]
            expected[:rows] += base.read(name)
        assert torch.equal(result.read(name), expected), name
    assert load_pretrained_model(target, device="cpu").tokenizer.convert_tokens_to_ids("<im_end>") > 0


def assert_untouched(target: Path) -> None:
    assert not target.exists() and not part_of(target).exists()


def test_apply_gives_back_the_target(work):
    target = apply_delta(work / "llm", work / "target", work / "delta")
    assert_applied(work, target)
    original, result = WeightFiles.of_folder(work / "llava"), WeightFiles.of_folder(target)
    for name in original:
        difference = (original.read(name).float() - result.read(name).float()).abs().max()
        assert difference <= 2e-3, name
    assert "research only" in (target / "README.md").read_text().lower()
    assert not part_of(target).exists()


def test_a_delta_keeps_the_precision_of_each_tensor(work):
    """A projector in float32 beside a language model in half precision is whole in the delta, and stays exact."""
    name = "model.mm_projector.weight"
    exact = torch.rand(load_file(work / "llava" / "model.safetensors")[name].shape)
    edit_tensors(work / "llava", lambda tensors: tensors.update({name: exact}))
    for target, dtype in (("own", torch.float32), ("half", torch.float16)):
        make_delta(work / "llm", work / "llava", work / target, dtype=None if target == "own" else dtype)
        delta = load_file(work / target / "model.safetensors")
        assert torch.equal(delta[name], exact.to(dtype)) and delta["model.norm.weight"].dtype == torch.float16


def test_mistral_with_added_tokens(tmp_path):
    make_pair(tmp_path, "mistral")
    assert_applied(tmp_path, apply_delta(tmp_path / "llm", tmp_path / "target", tmp_path / "delta"))


def test_many_shards_and_bin_base(work):
    tensors = load_file(work / "llm" / "model.safetensors")
    names = sorted(tensors)
    halves = {"a": names[::2], "b": names[1::2]}
    for part, keys in halves.items():
        torch.save({key: tensors[key] for key in keys}, work / "llm" / f"pytorch_model-{part}.bin")
    weight_map = {key: f"pytorch_model-{part}.bin" for part, keys in halves.items() for key in keys}
    write_json(work / "llm" / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    (work / "llm" / "model.safetensors").unlink()
    target = apply_delta(work / "llm", work / "target", work / "delta", max_shard_bytes=30_000)
    shards = sorted(target.glob("model-*.safetensors"))
    index = read_json(target / "model.safetensors.index.json")
    assert len(shards) > 2 and set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for path in shards for t in load_file(path).values())
    assert_applied(work, target)


@pytest.mark.parametrize("top", ["", "delta/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(work, top, method):
    path = zipped(work, top, method)
    target = apply_delta(work / "llm", work / "target", path)
    assert_applied(work, target)
    assert not (target / "delta").exists()


def test_zip_members_stay_inside(work):
    """Names that climb out, absolute names and links are never followed."""
    path = zipped(work, "delta/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped.json", "{}")
        archive.writestr("delta/../../escaped2.json", "{}")
        archive.writestr("/tmp/llava-escaped.json", "{}")
        archive.writestr("delta/run.py", "raise SystemExit")
        link = zipfile.ZipInfo("delta/link.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    target = apply_delta(work / "llm", work / "target", path)
    names = {entry.name for entry in target.iterdir()}
    assert not names & {"escaped.json", "escaped2.json", "run.py", "link.json", "llava-escaped.json"}
    assert not (work / "escaped.json").exists() and not Path("/tmp/llava-escaped.json").exists()


def test_zip_with_a_damaged_member(work):
    path = zipped(work, "delta/")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("delta/model.safetensors").header_offset + 5000
    content[start] ^= 1
    path.write_bytes(content)
    with pytest.raises(LlavaError, match=r"model\.safetensors in it is damaged.*fetch"):
        apply_delta(work / "llm", work / "target", path)
    assert_untouched(work / "target")


def test_zip_cut_off(work):
    path = zipped(work, "delta/")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LlavaError, match="not a whole zip"):
        apply_delta(work / "llm", work / "target", path)
    assert_untouched(work / "target")


def zipped(work: Path, top: str, method: int = zipfile.ZIP_STORED) -> Path:
    path = work / "delta.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted((work / "delta").iterdir()):
            archive.write(file, f"{top}{file.name}")
    return path


def edit_config(folder: Path, **fields) -> None:
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | fields)


def edit_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop(name):
    return lambda tensors: tensors.pop(name)


def narrow(name):
    def change(tensors):
        tensors[name] = tensors[name][:, :-1].contiguous()

    return change


def add_rows(tensors):
    tensors["model.embed_tokens.weight"] = torch.zeros(900, 32, dtype=torch.float16)


MISFITS = {
    "no config in base": (lambda w: (w / "llm/config.json").unlink(), r"llm/config\.json: no such file"),
    "no config in delta": (lambda w: (w / "delta/config.json").unlink(), r"delta/config\.json: no such file"),
    "no weights": (lambda w: (w / "llm/model.safetensors").unlink(), "no weights found"),
    "width": (lambda w: edit_config(w / "llm", hidden_size=64), r"hidden_size 64, delta .* has 32"),
    "layers": (lambda w: edit_config(w / "delta", num_hidden_layers=3), "num_hidden_layers 2"),
    "family": (
        lambda w: edit_config(w / "llm", model_type="mistral"),
        "give the base that the delta was made from",
    ),
    "other family": (lambda w: edit_config(w / "llm", model_type="gpt2"), "'gpt2'"),
    "missing in base": (
        lambda w: edit_tensors(w / "llm", drop("model.layers.1.mlp.up_proj.weight")),
        r"the base has no model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "missing in delta": (lambda w: edit_tensors(w / "delta", drop("model.norm.weight")), r"delta has no model\.norm"),
    "base finished": (lambda w: swap(w), "finished LLaVA"),
    "more rows in base": (lambda w: edit_tensors(w / "llm", add_rows), r"900 rows in the base"),
    "shape": (
        lambda w: edit_tensors(w / "llm", narrow("model.layers.0.mlp.up_proj.weight")),
        r"up_proj\.weight has shape \[64, 31\] in the base",
    ),
    "rows and config": (lambda w: edit_config(w / "delta", vocab_size=77), "vocab_size 77"),
    "truncated": (
        lambda w: (w / "delta/model.safetensors").write_bytes((w / "delta/model.safetensors").read_bytes()[:-50]),
        "cut off",
    ),
}


def swap(work: Path) -> None:
    shutil.rmtree(work / "llm")
    shutil.copytree(work / "llava", work / "llm")


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_said_before_any_work(work, misfit, monkeypatch):
    spoil, words = MISFITS[misfit]
    spoil(work)
    monkeypatch.setattr(delta_module, "write_shards", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(LlavaError, match=words):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert_untouched(work / "target")


def test_target_is_not_overwritten_unasked(work):
    (work / "target").mkdir()
    (work / "target/mine.txt").write_text("mine")
    with pytest.raises(LlavaError, match="isn't empty"):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert (work / "target/mine.txt").read_text() == "mine"
    apply_delta(work / "llm", work / "target", work / "delta", overwrite=True)
    assert_applied(work, work / "target")
    assert not (work / "target/mine.txt").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_values_are_noticed_by_checksum(work, kind):
    """A flipped bit in a tensor: our own shards and `.bin` files record checksums."""
    path = work / "delta/model.safetensors"
    if kind == "bin":
        torch.save(load_file(path), work / "delta/pytorch_model.bin")
        path.unlink()
        path = work / "delta/pytorch_model.bin"
    content = bytearray(path.read_bytes())
    norm = WeightFiles.of_folder(work / "delta").read("model.layers.1.mlp.up_proj.weight").numpy().tobytes()
    content[content.index(norm) + 9] ^= 4
    path.write_bytes(content)
    (work / "target").mkdir()
    with pytest.raises(LlavaError, match=r"checksum .* damaged, fetch it again"):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert list((work / "target").iterdir()) == [] and not part_of(work / "target").exists()


def test_not_enough_space_is_said_before_any_work(work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(LlavaError, match=r"not enough disk space for .*target"):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert_untouched(work / "target")


def test_disk_that_refuses(work):
    """The limit on file size stands for a disk that fills up: space can vanish after it was counted."""
    done = run_apply(work, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "no room to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert_untouched(work / "target")


def run_apply(work: Path, code: str = "", **options) -> subprocess.CompletedProcess:
    script = f"import os, sys\nfrom llava.commandline import run\nfrom llava.model import apply_delta\n{code}\n"
    arguments = ["--base", work / "llm", "--target", work / "target", "--delta", work / "delta"]
    script += "run(apply_delta.main)"
    root = Path(__file__).parents[2]
    # Under `make coverage` a process writes what it has counted, for which there may be no room.
    uncounted = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=root,
        env=uncounted | {"PYTHONPATH": str(root)},
        **options,
    )


KILL_AFTER = """
from llava.model.weights import shards
shards.WRITERS = 1
add, count = shards._Journal.add, [0]
def add_and_die(self, name, checksum):
    add(self, name, checksum)
    count[0] += 1
    if count[0] == 5:
        os._exit(9)
shards._Journal.add = add_and_die
"""


def test_killed_run_goes_on(work, caplog):
    done = run_apply(work, KILL_AFTER)
    assert done.returncode == 9
    assert not (work / "target").exists()
    assert len((part_of(work / "target") / "journal.txt").read_text().splitlines()) == 6
    with caplog.at_level("INFO"):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert "going on from an earlier attempt: 5 of" in caplog.text
    assert_applied(work, work / "target")
    assert not part_of(work / "target").exists()


@pytest.fixture
def stopped(work, monkeypatch) -> Path:
    """The staging folder of a run that was stopped (Ctrl-C) after five tensors or a few more."""
    add, count = shards._Journal.add, [0]

    def add_and_stop(self, name, checksum):
        add(self, name, checksum)
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "WRITERS", 1)
        patch.setattr(shards._Journal, "add", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            apply_delta(work / "llm", work / "target", work / "delta")
    assert not (work / "target").exists()
    return part_of(work / "target")


def test_stopped_run_with_other_inputs_starts_afresh(work, stopped, caplog):
    edit_tensors(work / "llm", lambda tensors: tensors["model.norm.weight"].add_(1))
    with caplog.at_level("INFO"):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert "starting afresh" in caplog.text
    assert_applied(work, work / "target")


def test_shards_of_a_stopped_run_that_were_cut_otherwise_do_not_stay(work, stopped):
    apply_delta(work / "llm", work / "target", work / "delta", max_shard_bytes=100_000)
    assert not (work / "target" / "model.safetensors").exists()
    assert_applied(work, work / "target")


def test_torn_tensor_of_a_stopped_run_is_written_again(work, stopped, caplog):
    """Noted as done, but what the disk holds is something else: a power cut."""
    path = stopped / "model.safetensors"
    content = path.read_bytes()
    start = next(place for place, byte in enumerate(content) if byte)
    path.write_bytes(content[:start] + bytes(64) + content[start + 64 :])
    noted = len((stopped / "journal.txt").read_text().splitlines()) - 1
    with caplog.at_level("INFO"):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert noted >= 5 and f"going on from an earlier attempt: {noted - 1} of" in caplog.text
    assert_applied(work, work / "target")


def test_written_tensors_are_verified(work, monkeypatch):
    """A write that silently goes wrong is found, and nothing is left."""
    write, count = shards._write_at, [0]

    def spoil(handle, data, offset):
        count[0] += 1
        write(handle, memoryview(bytes(len(data))) if count[0] == 4 else data, offset)

    monkeypatch.setattr(shards, "_write_at", spoil)
    with pytest.raises(LlavaError, match="reads back other than it was written"):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert_untouched(work / "target")


def test_one_process_at_a_time(work):
    with (
        pytest.raises(RuntimeError, match="outer"),
        stage(work / "target"),
    ):
        with pytest.raises(LlavaError, match="another process is writing"):
            apply_delta(work / "llm", work / "target", work / "delta")
        raise RuntimeError("outer")
    assert_untouched(work / "target")


def test_bin_delta_with_code_does_not_run(work, tmp_path):
    """A pickle that would run a command when loaded."""
    flag = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {flag}",)

    (work / "delta/model.safetensors").unlink()
    torch.save({"model.norm.weight": Attack()}, work / "delta/pytorch_model.bin")
    with pytest.raises(LlavaError, match="could run code"):
        apply_delta(work / "llm", work / "target", work / "delta")
    assert not flag.exists()
    assert_untouched(work / "target")


def test_make_delta_command_and_upload_needs_a_login(work, monkeypatch, capsys):
    arguments = ["--base-model-path", work / "llm", "--target-model-path", work / "llava", "--delta-path"]
    make_delta_command.main(list(map(str, [*arguments, work / "made"])))
    assert "complete and verified" in capsys.readouterr().out
    made, delta = WeightFiles.of_folder(work / "made"), WeightFiles.of_folder(work / "delta")
    assert all(torch.equal(made.read(name), delta.read(name)) for name in delta)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(LlavaError, match="needs a login"):
        make_delta_command.main(list(map(str, [*arguments, work / "more", "--hub-repo-id", "someone/delta"])))
    assert not (work / "more").exists()


def test_plain_base_without_added_tokens(tmp_path):
    """Mistral's releases add no tokens: the same rows in both."""
    make_llava(tmp_path, "mistral")
    make_llm(tmp_path / "llm", "mistral")
    make_delta(tmp_path / "llm", tmp_path / "llava", tmp_path / "delta")
    assert json.loads((tmp_path / "delta/config.json").read_text())["model_type"] == "llava_mistral"
    with pytest.raises(LlavaError, match="delta weights, not a model"):
        load_pretrained_model(tmp_path / "delta", device="cpu")
    apply_delta(tmp_path / "llm", tmp_path / "target", tmp_path / "delta")
    load_pretrained_model(tmp_path / "target", device="cpu")
    trained, again = (WeightFiles.of_folder(tmp_path / name) for name in ("llava", "target"))
    assert {trained.dtype(name) for name in trained} == {torch.float32}  # no less of it by default
    for name in trained:
        torch.testing.assert_close(again.read(name), trained.read(name), rtol=1e-6, atol=1e-7)


def test_damaged_values_are_taken_if_checking_is_switched_off(work):
    path = work / "delta/model.safetensors"
    content = bytearray(path.read_bytes())
    name = "model.layers.1.mlp.up_proj.weight"
    content[content.index(WeightFiles.of_folder(work / "delta").read(name).numpy().tobytes()) + 9] ^= 4
    path.write_bytes(content)
    words = ["--base", str(work / "llm"), "--delta", str(work / "delta"), "--target", str(work / "target")]
    with pytest.raises(LlavaError, match="damaged"):
        apply_delta_command.main(words)
    apply_delta_command.main([*words, "--check-inputs", "False"])
    assert_applied(work, work / "target")
