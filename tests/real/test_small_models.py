"""SmolLM2's text as transformers gives it, by 100 prompts: whole, streamed and by the API."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava.conversation import get_template
from llava.generation import Engine, Request, SamplingParams
from llava.model import load_pretrained_model
from llava.tokenization import encode_prompt
from tests.real.test_gguf import QUESTIONS
from tests.tiny_serving import serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

MORE = (
    "Schreib einen Satz auf Deutsch über Lungen.",
    "用中文说你好。",
    "Write 👩‍⚕️🩺🫁 1998?",
    "Count: 1998, 1999,",
)
"""Characters of several tokens, and digits."""
WORDS = (
    "lung", "heart", "liver", "kidney", "brain", "spleen", "aorta", "femur", "skull", "rib", "retina", "tumour", "cyst",
    "stent", "scanner", "biopsy", "fever", "cough", "anaemia", "asthma", "river", "planet", "bridge", "poem", "number",
    "colour", "forest", "engine", "clock", "island", "music", "market", "garden", "mirror", "window", "winter", "bread",
    "stone",
)  # fmt: skip
PROMPTS = (
    *QUESTIONS,
    *MORE,
    *(form.format(word) for word in WORDS for form in ("Define {}.", "Write a sentence with “{}” in it, please.")),
)
NEW = 16


def conversation(question):
    started = get_template("smollm2")
    started.append_message(started.roles[0], question)
    return started


@pytest.fixture(scope="module")
def expected(small_models, llava):
    """{question: transformers' greedy text}, float32, by the language model's own folder and chat template."""
    loaded = load_pretrained_model(llava, device="cpu")
    tokenizer = loaded.tokenizer
    plain = AutoModelForCausalLM.from_pretrained(small_models / "smollm2-135m", dtype=torch.float32).eval()
    texts = {}
    for question in PROMPTS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == encode_prompt(conversation(question), tokenizer)
        found = plain.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
        texts[question] = tokenizer.decode(found, skip_special_tokens=True).strip()
    return loaded, texts


def test_there_are_a_hundred():
    assert len(set(PROMPTS)) == 100


def test_text_whole_and_streamed(expected):
    loaded, texts = expected
    engine = Engine(loaded)
    requests = [Request(conversation(question), (), SamplingParams(max_new_tokens=NEW)) for question in texts]
    assert [answer.text for answer in engine.generate(requests)] == list(texts.values())
    for question, text in texts.items():
        request = Request(conversation(question), (), SamplingParams(max_new_tokens=NEW))
        pieces = list(engine.stream(request))
        assert "".join(pieces).strip() == text and not any("\ufffd" in piece for piece in pieces[:-1])


def test_text_of_the_api_whole_and_streamed(expected, llava):
    texts = expected[1]
    with serving(llava, "smollm2") as client:

        def ask(question):
            words = {"model": "smollm2", "messages": [{"role": "user", "content": question}]}
            words |= {"max_tokens": NEW, "temperature": 0}
            whole = client.chat.completions.create(**words).choices[0].message.content
            parts = client.chat.completions.create(**words, stream=True)
            return whole, "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

        with ThreadPoolExecutor(4) as pool:
            answers = dict(zip(texts, pool.map(ask, texts), strict=True))
    assert {question: whole.strip() for question, (whole, _) in answers.items()} == texts
    assert {question: streamed.strip() for question, (_, streamed) in answers.items()} == texts
