"""What released chat models are like, on small random stand-ins of the same form: text as transformers gives it.

Tied embeddings, a byte-level vocabulary, ends of a turn besides the end of text, files in bfloat16, LLaMA-3's template.
tests/real asks the same of real weights.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava.conversation import get_template
from llava.generation import Engine, Request, SamplingParams
from llava.model import load_pretrained_model
from llava.model.families import family_of
from llava.records import read_json, write_json
from llava.tokenization import stop_token_ids
from tests.tiny import make_chat_llava
from tests.tiny_serving import tiny_client, tiny_serving

__all__ = ["tiny_client", "tiny_serving"]

QUESTIONS = ("Is there a fracture?", "Count 1 22  333", "é 日本 👩‍⚕️?", "  blanks\n\n")
NEW = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_chat_llava(tmp_path_factory.mktemp("chat"), digits=True)


@pytest.fixture(scope="module")
def checkpoint(made):
    """What `tiny_serving` serves."""
    return made[0]


def conversation(question):
    started = get_template("chatml")
    started.append_message(started.roles[0], question)
    return started


def expected(llm, tokenizer, question, **how):
    """transformers' own greedy text."""
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    found = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, **how)[0, len(ids) :]
    return tokenizer.decode(found, skip_special_tokens=True).strip()


def test_whole_and_streamed_text_is_transformers(made):
    loaded = load_pretrained_model(made[0], device="cpu")
    engine = Engine(loaded)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    for question in QUESTIONS:
        request = Request(conversation(question), (), SamplingParams(max_new_tokens=NEW))
        text = expected(made[1], loaded.tokenizer, question)
        assert engine.generate([request])[0].text == text
        assert "".join(engine.stream(request)).strip() == text


def test_by_the_api(made, tiny_client):
    tokenizer = load_pretrained_model(made[0], device="cpu").tokenizer
    how = {"model": "tiny", "max_tokens": NEW, "temperature": 0}
    for question in QUESTIONS[:3]:
        messages = [{"role": "user", "content": question}]
        whole = tiny_client.chat.completions.create(messages=messages, **how).choices[0].message.content
        stream = tiny_client.chat.completions.create(messages=messages, stream=True, **how)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert whole.strip() == "".join(pieces).strip() == expected(made[1], tokenizer, question)


def test_every_end_of_the_configuration_ends_an_answer(made, tmp_path):
    """LLaMA-3.1 and SmolLM2 name more ends than the tokenizer's; a default that is no special token ends nothing."""
    loaded = load_pretrained_model(made[0], device="cpu")
    request = Request(conversation("Where?"), (), SamplingParams(max_new_tokens=NEW, logit_bias={0: 100.0}))
    config = loaded.model.config
    config.eos_token_id = 2
    assert len(Engine(loaded).generate([request])[0].token_ids) == NEW  # <|endoftext|> over and over
    config.eos_token_id = [2, 0]
    answer = Engine(loaded).generate([request])[0]
    assert answer.finish_reason == "stop" and len(answer.token_ids) <= 1
    config.eos_token_id = [2, 77]
    request = Request(conversation("Where?"), (), SamplingParams(max_new_tokens=4, logit_bias={77: 100.0}))
    assert len(Engine(loaded).generate([request])[0].token_ids) == 4


def test_files_in_bfloat16_keep_it(tmp_path):
    llava, _ = make_chat_llava(tmp_path, dtype="bfloat16")
    half = load_pretrained_model(llava, device="cpu", dtype="bfloat16")
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    answer = Engine(half).generate([Request(conversation("Where?"), (), SamplingParams(max_new_tokens=4))])[0]
    assert answer.token_ids


@pytest.mark.parametrize(
    ("template", "user", "assistant", "end"),
    [
        ("chatml", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        (
            "llama_3",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
    ],
)
def test_templates_of_chat_models(template, user, assistant, end, made):
    asked = get_template(template)
    for role, text in zip((0, 1, 0, 1), ("A?", "B", "C?", None)):
        asked.append_message(asked.roles[role], text)
    assert asked.get_prompt() == f"{user}A?{end}{assistant}B{end}{user}C?{end}{assistant}"
    asked.set_system("Be short.")
    mark = asked.roles[0].replace("user", "system")
    assert asked.get_prompt().startswith(mark + "Be short." + asked.stop_str)
    tokenizer = load_pretrained_model(made[0], device="cpu").tokenizer
    assert 2 in stop_token_ids(asked, tokenizer)


def test_the_template_is_told_by_the_chat_template(made):
    loaded = load_pretrained_model(made[0], device="cpu")
    family = family_of(loaded.model.config)
    assert family.recognise_chat(loaded.tokenizer.chat_template) == "chatml"
    assert family.recognise_chat("{{ '<|start_header_id|>' }}") == "llama_3"
    smol = "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>"
    assert family.recognise_chat(smol) == "smollm2" and family.recognise_chat("[INST]") is None
    path = made[0] / "config.json"
    config = read_json(path)
    write_json(path, config | {"conversation_template": None})
    try:
        assert load_pretrained_model(made[0], device="cpu").model.config.conversation_template == "chatml"
    finally:
        write_json(path, config)
