"""lmms-eval's own file for LLaVA, executed as it is; only what it imports of its own package stands in.

`make test` installs the package without its dependencies beside the environment (LMMS_EVAL names another place).
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.conversation import get_template
from llava.generation import Engine, Request, SamplingParams
from llava.model import load_pretrained_model

PLACE = Path(os.environ.get("LMMS_EVAL", Path(sys.prefix) / "lmms-eval"))
FILE = PLACE / "lmms_eval" / "models" / "simple" / "llava.py"
NEW = 12


class Collator:
    """Batches in the order given."""

    def __init__(self, arguments, key, grouping):
        self.arguments = arguments

    def get_batched(self, n, batch_fn):
        return [self.arguments[start : start + n] for start in range(0, len(self.arguments), n)]

    def get_original(self, answers):
        return answers


class Base:
    """Stands in for lmms_eval's base class."""

    def __init__(self):
        self.task_dict = {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture(scope="module")
def tool():
    """The file's class."""
    if not FILE.is_file():
        pytest.skip(f"lmms-eval isn't installed at {PLACE}; make test installs it")
    stubs = {
        "lmms_eval": {},
        "lmms_eval.utils": {"Collator": Collator},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": SimpleNamespace},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.api.registry": {"register_model": lambda name: lambda kind: kind},
        "loguru": {"logger": SimpleNamespace(info=lambda *_: None, debug=pytest.fail, error=pytest.fail)},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in stubs.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        patch.setattr(sys.modules["lmms_eval"], "utils", sys.modules["lmms_eval.utils"], raising=False)
        spec = importlib.util.spec_from_file_location("lmms_eval_llava", FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module.Llava


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (30 + n, 40, 3), dtype=np.uint8)) for n in range(3)]


QUESTIONS = ["Is there a fracture?", "What does the picture show, left or right?", "Which?", "Yes?"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_its_answers_are_the_engines(tool, folder, images, batch_size):
    visuals = [[images[0]], [images[1]], [images[1], images[2]], [images[0]]]
    model = tool(str(folder), device="cpu", device_map="auto", batch_size=batch_size)
    model.task_dict = {"task": {"test": {n: visuals[n] for n in range(4)}}}
    requests = [
        SimpleNamespace(args=(question, {"max_new_tokens": NEW}, lambda doc: doc, n, "task", "test"))
        for n, question in enumerate(QUESTIONS)
    ]
    answers = model.generate_until(requests)

    loaded = load_pretrained_model(folder, device="cpu")
    expected = []
    for question, own in zip(QUESTIONS, visuals, strict=True):
        conversation = get_template("vicuna_v1")
        conversation.append_message(conversation.roles[0], " ".join(["<image>"] * len(own)) + "\n" + question)
        conversation.append_message(conversation.roles[1], None)
        pixels = [torch.from_numpy(one).half().float().numpy() for one in loaded.image_processor(own)]
        expected.append(Request(conversation.get_prompt(), pixels, SamplingParams(max_new_tokens=NEW)))
    texts = [answer.text for answer in Engine(loaded).generate(expected)]
    assert [answer.strip() for answer in answers] == texts and all(texts)


def test_its_likelihood_of_an_answer(tool, folder, images):
    model = tool(str(folder), device="cpu", device_map="auto")
    model.task_dict = {"task": {"test": {0: [images[0]]}}}
    request = SimpleNamespace(args=("Which side?", lambda doc: "left", lambda doc: doc, 0, "task", "test"))
    ((loss, is_greedy),) = model.loglikelihood([request])
    assert 0 < loss < 20 and is_greedy is False
