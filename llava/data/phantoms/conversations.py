"""Records of phantoms: captions for stage 1, conversations for stage 2, VQA questions; the same as text alone.

Records are LLaVA-Med's. A conversation asks about a fact once, so that no answer follows from an earlier one.
Training answers are sentences that say the fact; the test's references are the bare fact, or yes or no.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.phantoms.findings import DOMAINS, SHAPES, Phantom
from llava.data.phantoms.questions import (
    CHOICE,
    FINDING_FACTS,
    IMAGE_FACTS,
    OPEN,
    TEMPLATES,
    YES_NO,
    Dealer,
    Question,
    Template,
    statement,
    templates_of,
    value_of,
)
from llava.records import Record

FORMS = (OPEN, YES_NO, CHOICE)
FORM_SHARES = (0.35, 0.45, 0.2)
"""How often a training question is open, yes/no, a choice of two."""

_LOOKS = {"disc": "round", "ring": "hollow", "star": "spiked", "band": "long"}


def caption_sentences(phantom: Phantom) -> list[str]:
    """What the image shows, a fact per sentence."""
    facts = ["modality", "organ"] + (["normality"] if phantom.is_normal else ["kind"])
    sentences = [statement(fact, phantom) for fact in facts]
    if not phantom.is_normal:
        sentences.append(f"It looks {_LOOKS[SHAPES[phantom.finding]]}.")
        sentences += [statement(fact, phantom) for fact in ("number", "size", "side", "place")]
    return sentences


def caption_record(name: str, phantom: Phantom) -> Record:
    """Stage 1: image and caption."""
    turns = [("Describe the picture.\n" + DEFAULT_IMAGE_TOKEN, " ".join(caption_sentences(phantom)))]
    return _record(name, name, phantom, turns)


def conversation_record(name: str, image: str, phantom: Phantom, dealer: Dealer, random: np.random.Generator) -> Record:
    """Several turns, each about another fact; answers are sentences, as an assistant's."""
    questions = [dealer.ask(template, phantom) for template in _agenda(phantom, random)]
    turns = [(question.text, spoken(question)) for question in questions]
    turns[0] = (DEFAULT_IMAGE_TOKEN + "\n" + turns[0][0], turns[0][1])
    return _record(name, image, phantom, turns)


def text_record(name: str, phantom: Phantom, dealer: Dealer, random: np.random.Generator) -> Record:
    """A conversation about notes in place of an image: what the language model learns from."""
    record = conversation_record(name, name, phantom, dealer, random)
    first = record["conversations"][0]
    first["value"] = first["value"].replace(DEFAULT_IMAGE_TOKEN, notes(phantom, random))
    del record["image"]
    return record


def comparison_record(name: str, phantom: Phantom, dealer: Dealer, random: np.random.Generator) -> Record:
    """A yes/no question about nothing that is shown: the fact in the answer is a guess, but yes or no follows."""
    facts = [*IMAGE_FACTS, *(["normality"] if phantom.is_normal else ["kind", "side", "place", "size", "number"])]
    templates = templates_of(facts[random.integers(len(facts))], YES_NO)
    question = dealer.ask(templates[random.integers(len(templates))], phantom)
    record = _record(name, name, phantom, [(question.text, spoken(question))])
    del record["image"]
    return record


def notes(phantom: Phantom, random: np.random.Generator) -> str:
    """The caption's facts in any order, as sentences or as words: where a fact stands says nothing."""
    if random.random() < 0.4:
        return " ".join(random.permutation(caption_sentences(phantom)))
    facts = [
        "modality",
        "organ",
        *(["normality"] if phantom.is_normal else ["kind", "number", "size", "side", "place"]),
    ]
    words = [value_of(fact, phantom) for fact in facts]
    if not phantom.is_normal:
        words.append(_LOOKS[SHAPES[phantom.finding]])
    return ", ".join(random.permutation(words)) + "."


def retelling_record(name: str, phantom: Phantom, random: np.random.Generator) -> Record:
    """Notes, and the caption that they make; `plain`: text without a prompt template."""
    turns = [(notes(phantom, random), " ".join(caption_sentences(phantom)))]
    record = _record(name, name, phantom, turns) | {"plain": True}
    del record["image"]
    return record


def test_records(names: Sequence[str], phantoms: Sequence[Phantom]) -> list[Record]:
    """One question per record: of each image every family once, its templates in turn.

    Images without a finding, and as many with one, are asked whether they are normal.
    """
    records: list[Record] = []
    dealer, asked = Dealer(), Counter[tuple[str, ...]]()
    families = sorted({(template.fact, template.form) for template in TEMPLATES})
    normals = sum(phantom.is_normal for phantom in phantoms)
    abnormal_asked = 0
    for name, phantom in zip(names, phantoms):
        for fact, form in families:
            if fact == "normality" and not phantom.is_normal:
                if abnormal_asked >= normals:
                    continue
                abnormal_asked += 1
            elif fact in FINDING_FACTS and fact != "normality" and phantom.is_normal:
                continue
            templates = templates_of(fact, form)
            value = value_of(fact, phantom)
            template = templates[asked[fact, form, value] % len(templates)]
            asked[fact, form, value] += 1
            records.append(_test_record(f"{name}_{template.family}", name, phantom, dealer.ask(template, phantom)))
    return records


def spoken(question: Question) -> str:
    """An assistant's answer: the fact, then what follows from it.

    Before yes or no both that are compared are said again, side by side: a small model can't compare what is far apart.
    """
    if question.template.form == YES_NO:
        return f"{question.statement} So {question.named}: {question.answer}."
    return question.statement


def _agenda(phantom: Phantom, random: np.random.Generator) -> list[Template]:
    """Templates for one conversation: independent facts in random order."""
    about_image = list(random.permutation(["modality", "organ"]))
    if phantom.is_normal:
        return [_pick("normality", random)] + [_pick(fact, random) for fact in about_image[:1]]
    place = ["where"] if random.random() < 0.2 else ["side", "place"]
    facts = ["kind", "size", "number", *place] + about_image[: int(random.random() < 0.25)]
    agenda = [_pick(fact, random) for fact in random.permutation(facts)]
    # Whatever was said of a finding would give this away: it comes first or not at all.
    return ([_pick("normality", random)] if random.random() < 0.12 else []) + agenda


def _pick(fact: str, random: np.random.Generator) -> Template:
    forms = [form for form in FORMS if templates_of(fact, form)]
    shares = np.array([FORM_SHARES[FORMS.index(form)] for form in forms])
    form = forms[random.choice(len(forms), p=shares / shares.sum())]
    templates = templates_of(fact, form)
    return templates[random.integers(len(templates))]


def _record(name: str, image: str, phantom: Phantom, turns: list[tuple[str, str]]) -> Record:
    conversations = []
    for question, answer in turns:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    domain = {domain.key: index == phantom.domain for index, domain in enumerate(DOMAINS)}
    return {"id": name, "image": f"{image}.png", "domain": domain, "conversations": conversations}


def _test_record(name: str, image: str, phantom: Phantom, question: Question) -> Record:
    record = _record(name, image, phantom, [(f"{DEFAULT_IMAGE_TOKEN}\n{question.text}", question.answer)])
    template = question.template
    return record | {
        "answer_type": "OPEN" if template.form == OPEN else "CLOSED",
        "family": template.family,
        "template": template.name,
        "finding": template.is_finding,
    }
