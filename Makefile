# Two commands to start with: `make demo` (the full pipeline on a laptop) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OPENCLIP := $(VENV)/openclip
DEEPSPEED := $(VENV)/.deepspeed
LMMS_EVAL := $(VENV)/lmms-eval
LLAMA_CPP := $(VENV)/.llama-cpp
CLIENTS := $(VENV)/clients
OLDEST := $(VENV)/oldest

.PHONY: help install lock audit sbom demo serve chat clients test coverage test-all test-real test-oldest fuzz fuzz-api kills soak lint format images docs clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(STAMP)  ## make the virtual environment and install everything into it; EXTRAS=deepspeed,liger adds those
	$(if $(EXTRAS),$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]')

# Whatever is downloaded has to have one of the lock's hashes. torch's builds differ by platform: it is only pinned.
$(STAMP): pyproject.toml constraints.txt requirements.lock
	@echo 'installing into $(VENV): downloads and unpacks about 4 GB (CUDA builds of torch: 7), in about three minutes; pip is silent meanwhile'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,serve,medical,slides,openai,quantized,stats,torchao,tracking,gguf]'
	touch $@

# deepspeed isn't a wheel: building it runs code of packages that no hash covers.
lock:  ## write requirements.lock anew, after a change of constraints.txt
	grep -vE '^(torch|deepspeed)==' constraints.txt | $(BIN)/uv pip compile --quiet --no-deps --generate-hashes \
		--no-header --no-annotate --output-file requirements.lock -

audit: $(STAMP)  ## ask whether a pinned package has known holes
	$(BIN)/python scripts/audit.py constraints.txt

sbom: $(STAMP)  ## write sbom.json, what is installed (CycloneDX)
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.json $(BIN)/python

# Not in the environment: with a CPU build of torch, torchvision breaks transformers where it is importable.
$(OPENCLIP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@.part \
		torchvision==0.28.0 timm==1.0.31 open-clip-torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4
	rm -rf $@ && mv $@.part $@

# One file of it is executed by a test; its dependencies, which clash with ours, aren't needed for that.
$(LMMS_EVAL): $(STAMP)
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@.part lmms-eval==0.7.3 \
		&& rm -rf $@ && mv $@.part $@

demo: $(STAMP)  ## train, evaluate and compare small models on the built-in images (about six minutes, no GPU)
	$(BIN)/python -m llava.demo --output-dir runs/demo

serve: $(STAMP)  ## the web page and the API with the demo's model
	$(BIN)/python -m llava.serve --model-path runs/demo/vqa

chat: $(STAMP)  ## chat with the demo's model in the terminal
	$(BIN)/python -m llava.serve.cli --model-path runs/demo/vqa

# It is compiled while it is installed; where that fails, its tests say so and are skipped.
$(DEEPSPEED): $(STAMP)
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt deepspeed
	touch $@

test: $(STAMP) $(OPENCLIP) $(DEEPSPEED) $(LMMS_EVAL)  ## the tests that CI runs
	$(BIN)/python -m pytest -m 'not long and not gpu' -n 2 --dist loadfile

coverage: $(STAMP) $(OPENCLIP) $(DEEPSPEED) $(LMMS_EVAL)  ## the same, and which lines of llava/ they ran; a table in runs/coverage.txt
	mkdir -p runs
	$(BIN)/python -m pytest -m 'not long and not gpu' -n 2 --dist loadfile --cov --cov-report=
	$(BIN)/coverage report --show-missing > runs/coverage.txt; code=$$?; tail -1 runs/coverage.txt; exit $$code

# Clients of the API that others wrote, in an environment of their own; what can't be had is left out.
clients: $(CLIENTS)/.installed  ## install what tests/clients talks with (minutes)
$(CLIENTS)/.installed: $(STAMP)
	$(PYTHON) -m venv $(CLIENTS)
	-$(BIN)/uv pip install --quiet --python $(CLIENTS)/bin/python -r tests/clients/requirements.txt
	-$(BIN)/uv pip install --quiet --python $(CLIENTS)/bin/python --target $(CLIENTS)/openai-1 'openai<2'
	$(PYTHON) -m venv $(CLIENTS)/inspect
	-$(BIN)/uv pip install --quiet --python $(CLIENTS)/inspect/bin/python -r tests/clients/requirements-inspect.txt
	-command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix $(CLIENTS) openai@6
	touch $@

test-all: $(STAMP) $(OPENCLIP) $(DEEPSPEED) $(LMMS_EVAL) $(CLIENTS)/.installed  ## all tests, the long ones too
	$(BIN)/python -m pytest -m 'not gpu' -n 2 --dist loadfile

# Two builds of llama.cpp's library, for newer and older libcs; where neither can be loaded, the tests that need it say so
# and are skipped.
$(LLAMA_CPP): $(STAMP)
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llama-cpp-py-sync==0.11739 cffi==2.1.1 pycparser==3.12 \
		xllamacpp==2026.10.11549
	touch $@

test-real: $(STAMP) $(LLAMA_CPP)  ## load, train, answer, serve and export small released models (190 MB, minutes)
	PYTHON=$(BIN)/python sh scripts/fetch_small_models.sh
	$(BIN)/python -m pytest tests/real

# The lowest release of each package that pyproject.toml allows (torch's comes with CUDA on Linux: 4 GB), in an
# environment of its own.
$(OLDEST): $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $@.part
	$(BIN)/uv pip install --quiet --python $@.part/bin/python --resolution lowest-direct -r pyproject.toml \
		'pytest>=9.0.3' 'pytest-timeout>=2.4' 'pytest-xdist>=3.6' 'hypothesis>=6.140'
	rm -rf $@ && mv $@.part $@

OLDEST_TESTS := tests/tokenization tests/model tests/generation tests/golden $(addprefix tests/train/test_, \
	arguments.py legacy_flags.py step.py group_of_one.py train.py lora.py dry_run.py dry_run_inputs.py)
test-oldest: $(OLDEST)  ## models, training, answers and golden vectors with the oldest packages that are allowed
	PYTHONPATH="$(CURDIR)" $(OLDEST)/bin/python -m pytest -m 'not long and not gpu' -n 2 --dist loadfile $(OLDEST_TESTS)

# Routes without a body have only one request, so some more are asked for than are made.
fuzz-api: $(STAMP)  ## 10,000 requests made from the servers' descriptions (minutes)
	$(BIN)/python -m tests.security.fuzz --cases 12000

kills: $(STAMP)  ## 200 random SIGKILLs of commands and servers, figures as JSON (half an hour)
	$(BIN)/python -m tests.faults.kills --kills 200

soak: $(STAMP)  ## an hour of mixed load with a fault every 30 s; figures in runs/soak.json
	$(BIN)/python -m tests.faults.soak --minutes 60 --json runs/soak.json

FUZZ_FILES ?= 10000
fuzz: $(STAMP)  ## read FUZZ_FILES mutated files of each kind; figures in runs/fuzz.json
	mkdir -p runs
	$(BIN)/python -m tests.fuzz --count $(FUZZ_FILES) --json runs/fuzz.json

lint: $(STAMP)  ## linter, formatter, the contract of the layers, types, repeated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pylint llava

images: $(STAMP)  ## draw images/, photograph the demo's report and the page for docs/images (Chromium; after make demo)
	PYTHONPATH=. $(BIN)/python scripts/images.py
	$(BIN)/python scripts/report_images.py runs/demo/report.html
	LLAVA_SCREENSHOT_DIR=docs/images $(BIN)/python -m pytest -q -m 'not long and not gpu' -n 2 --dist loadfile \
		tests/serve/web/test_life.py tests/serve/test_web_scans.py tests/serve/test_web_browser.py

docs: $(STAMP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'built: site/index.html (to search in the pages: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8080)'

format: $(STAMP)  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and the demo's runs
	rm -rf $(VENV) runs site
