"""G9: every template of the three code bases renders as its own code base renders it."""

import json
from pathlib import Path

import pytest

from llava.conversation import get_template, template_names
from tests.conftest import golden_cases

RELEASE_OF_CODE_BASE = {
    "llava_med_v1.0.0": "llava_med_v1.0",
    "llava_med_v1.5": "llava_med_v1.5",
    "haotian_main": "llava",
}


def read(case: Path, name: str) -> tuple[dict, str]:
    return json.loads((case / name).read_text(encoding="utf-8")), RELEASE_OF_CODE_BASE[case.name]


@pytest.mark.parametrize("case", golden_cases("G9_prompts"))
def test_every_template_is_known_with_its_fields(case):
    expected, release = read(case, "templates.json")
    assert sorted(expected) == template_names(release)
    for name, fields in expected.items():
        template = get_template(name, release)
        ours = {field: getattr(template, field) for field in fields} | {
            "sep_style": template.sep_style.name,
            "roles": list(template.roles),
        }
        assert ours == fields, name


@pytest.mark.parametrize("case", golden_cases("G9_prompts"))
def test_every_prompt_is_exact(case):
    expected, release = read(case, "prompts.json")
    compared = 0
    for name, conversations in expected.items():
        for conversation in conversations:
            ours = get_template(name, release)
            for role, text in conversation["messages"]:
                # ["IMAGE", text, mode] stands for the tuple (text, image, mode)
                ours.append_message(role, tuple(text[1:]) if isinstance(text, list) else text)
            prompt = ours.get_prompt()
            if "error" in conversation:  # the reference crashes on an answered plain conversation; ours renders it
                assert all(_text(text).replace("<image>", "").strip() in prompt for _, text in conversation["messages"])
                continue
            assert prompt == conversation["prompt"], f"{name}: {conversation['title']}"
            compared += 1
    assert compared > 4 * len(expected)


def _text(message) -> str:
    return message[1] if isinstance(message, list) else message or ""
