#!/usr/bin/env bash
# Install a wheel into an empty environment, as somebody new would, and run the small demo: try_wheel.sh WHEEL
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet -c "$constraints" torch
"$place/venv/bin/pip" install --quiet -c "$constraints" "$wheel"
cd "$place"
"$place/venv/bin/llava-med" demo --small --output-dir "$place/demo"
test -s "$place/demo/report.html" && test -s "$place/demo/results.json"
echo "the wheel works: $(basename "$wheel")"
