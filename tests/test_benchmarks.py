"""Benchmarks run from the checkout as documented, in miniature, and write plain numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.browsing import CHROMIUM
from tests.tiny import make_llava, make_llm

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = {
    "api_client": ["--items", "20", "--latency", "0.01"],
    "apply_delta": ["--layers", "0", "--rounds", "1"],
    "cpu_products": ["--megabytes", "4", "--rounds", "1", "--rows", "2"],
    "layer_operations": [],
    "decode_roofline": [],
    "images": ["--slices", "4", "--rounds", "1", "--jpegs", "1"],
    "download": ["--articles", "20", "--rounds", "1", "--sequential-articles", "5"],
    "page": ["--loads", "1", "--images", "5", "--sides", "64"],
    "validate": ["--records", "1000"],
    "vqa_throughput": ["--limit", "2", "--repeat", "1", "--max-new-tokens", "2"],
}
LONG = {
    "load_checkpoint": ["--gigabytes", "0.7", "--repeat", "1"],
    "serve_load": ["--seconds", "2", "--turns", "1", "--requests", "20", "--distinct", "4", "--clients", "2"],
    "train_throughput": ["--size", "cpu"],
    "peers": ["--requests", "1", "8", "--new-tokens", "4", "--rounds", "1"],
}


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_a_benchmark_runs_in_miniature(name, tmp_path, shared_dir):
    flags = (SMALL | LONG)[name]
    if name == "vqa_throughput":
        if not (shared_dir / "vqa_rad").is_dir():
            pytest.skip(f"no VQA-RAD at {shared_dir}")
        flags = ["--model-path", str(make_llava(tmp_path / "model")), *flags]
    if name == "page" and CHROMIUM is None:
        pytest.skip("no Chromium here")
    if name == "peers":
        flags = ["--model-path", str(make_llm(tmp_path / "model")), *flags]
    # From elsewhere and without PYTHONPATH: the benchmark finds the code beside it.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, BENCHMARKS / f"{name}.py", *flags, "--json", tmp_path / "numbers.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers and all(isinstance(value, (int, float)) for value in numbers.values())
    assert all(key in done.stdout for key in numbers)


def test_a_decoding_step_of_a_7b_on_a_gpu(tmp_path):
    """Counted on tensors without content: few operations, one wait of the host, little more bytes than needed."""
    path = tmp_path / "numbers.json"
    subprocess.run([sys.executable, BENCHMARKS / "decode_roofline.py", "--json", path], check=True, cwd=tmp_path)
    numbers = json.loads(path.read_text())
    # torch's kernel for pages fills a tensor of two numbers too, so one more at most.
    assert numbers["operations_per_layer"] <= 13 and numbers["host_syncs_per_step"] == 1
    assert all(1 <= numbers[f"bytes_over_least_batch_{batch}"] < 1.1 for batch in (1, 32, 64))
    assert numbers["bandwidth_share_batch_1"] > 0.6 and numbers["bandwidth_share_batch_32"] > 0.75


def test_without_the_small_model_one_line_says_how_to_get_it(tmp_path):
    command = [sys.executable, BENCHMARKS / "peers.py", "--model-path", tmp_path / "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "scripts/fetch_small_models.sh" in done.stderr


def test_the_file_for_llama_cpp_is_written_where_its_library_is_missing_too(tmp_path):
    pytest.importorskip("gguf")
    code = "import sys; from peer_parts.gguf_file import write_gguf; print(write_gguf(sys.argv[1], sys.argv[2]))"
    command = [sys.executable, "-c", code, make_llm(tmp_path / "model"), tmp_path / "model.gguf"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
    assert (tmp_path / "model.gguf").stat().st_size > 1000


def test_every_benchmark_is_run_here():
    names = {path.stem for path in BENCHMARKS.glob("*.py")} - {"checkout"}
    assert names == {*SMALL, *LONG, "gpu"}


GPU_PARTS = {
    "small": ["ceilings", "decode"],
    "long": ["attention", "training", "layers", "layers_compiled", "whole_7b"],
}


@pytest.mark.parametrize("parts", ["small", pytest.param("long", marks=pytest.mark.long)])
def test_the_parts_of_the_gpu_benchmark_run_in_miniature_on_the_cpu(parts, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, BENCHMARKS / "gpu.py", "--miniature", "--json", tmp_path / "gpu.json"]
    command += ["--parts", *GPU_PARTS[parts]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results) == GPU_PARTS[parts]
    for part, result in results.items():
        assert len(result) > 1 and not result.get("error") and not result.get("wrong"), result
        assert result.get("mfu") is None  # the peak of this processor isn't known
        assert f"== {part} (" in done.stdout
