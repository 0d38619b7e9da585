"""Templates and rendering, beyond what the golden prompts hold."""

import subprocess
import sys

import pytest

from llava.conversation import RELEASES, SeparatorStyle, conv_templates, get_template, template_names
from llava.errors import LlavaError


def test_needs_no_heavy_import():
    script = "import sys, llava.conversation; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_names_list_the_known():
    with pytest.raises(LlavaError, match=r'unknown prompt template "0\.0\.1"; known: .*llava_llama_2.*vicuna_v1'):
        get_template("0.0.1")
    with pytest.raises(LlavaError, match="unknown release"):
        get_template("v1", "llava_v9")
    with pytest.raises(LlavaError, match=r'"simple" in release llava; known: .*mpt'):
        get_template("simple", "llava")


def test_every_template_has_its_name_and_release():
    for name, template in conv_templates.items():
        assert template.release in RELEASES
        assert name in (template.name, f"{template.release}/{template.name}")
    for release in RELEASES:
        for name in template_names(release):
            assert get_template(f"{release}/{name}") == get_template(name, release)
            assert name in template_names()


def test_a_plain_name_has_one_meaning_where_releases_disagree():
    assert get_template("v1").sep_style is SeparatorStyle.TWO
    assert get_template("v1", "llava_med_v1.0").sep_style is SeparatorStyle.SINGLE
    assert "LLaVA-Med" not in get_template("llava_v1").system
    assert "LLaVA-Med" in get_template("llava_med_v1.0/llava_v1").system


def test_copies_are_independent():
    first = get_template("simple")
    first.append_message("Human", "What is shown?")
    second = get_template("simple")
    assert len(second.messages) == second.offset == 2
    copy = first.copy()
    copy.messages[-1][1] = "changed"
    assert first.messages[-1][1] == "What is shown?"


@pytest.mark.parametrize(
    ("name", "stop"),
    [("simple", "###"), ("v1", "</s>"), ("mistral_instruct", "</s>"), ("mpt", "<|im_end|>"), ("plain", "\n")],
)
def test_stop_string(name, stop):
    assert get_template(name).stop_str == stop


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_answers_are_apart_and_end_with_the_end_mark(name):
    template = get_template(name)
    for role, text in zip(template.roles * 2, ["one?", "first answer", "two?", "second answer"]):
        template.append_message(role, text)
    answers = [segment.text for segment in template.segments() if segment.is_answer][-2:]
    assert ["first answer" in answers[0], "second answer" in answers[1]] == [True, True]
    assert all(answer.endswith(template.stop_str) for answer in answers)
    assert "".join(segment.text for segment in template.segments()) == template.get_prompt()


@pytest.mark.parametrize(
    ("name", "text", "placed"),
    [
        ("v1", "Where?\n<image>", "<image>\nWhere?"),
        ("v1", "<image>\nWhere?", "<image>\nWhere?"),
        ("v1", "a<image> b", "<image>\na b"),
        ("v1", "<image>", "<image>"),
        ("v1", "no image ", "no image "),
        ("v1", "<image> or <image>?", "<image> or <image>?"),
        ("simple", "Where?\n<image>", "Where?\n<image>"),
        ("v1_mmtag", "Where?\n<image>", "<Image><image></Image>\nWhere?"),
        ("v1_mmtag", "<Image><image></Image>\nWhere?", "<Image><image></Image>\nWhere?"),
        ("v1_mmtag", "<image> or <image>", "<Image><image></Image> or <Image><image></Image>"),
    ],
)
def test_place_of_images(name, text, placed):
    template = get_template(name)
    assert template.place_images(text) == placed
    assert template.place_images(placed) == placed
