"""The built-in set: what is held out, that answers are balanced, that images show their findings."""

from collections import Counter, defaultdict
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from llava.data.phantoms import DOMAINS, TEMPLATES, Counts, Phantom, draw_facts, is_held_out, write_phantoms
from llava.data.phantoms.__main__ import build_parser
from llava.data.phantoms.build import TEST_NORMALS
from llava.data.phantoms.conversations import conversation_record, spoken, test_records
from llava.data.phantoms.drawing import CENTERS, draw
from llava.data.phantoms.findings import all_combinations
from llava.data.phantoms.questions import CHOICE, YES_NO, Dealer, templates_of, value_of
from llava.data.vqa_items import read_vqa_items
from llava.errors import LlavaError
from llava.eval.metrics.strict import question_options, strict_item
from llava.records import read_records

make_test_records = test_records  # pytest would take the function for a test
del test_records


@pytest.fixture(scope="module")
def test_split():
    phantoms = draw_facts(208, 3, held_out=True, normal_share=TEST_NORMALS / 208, stream=1)
    names = [f"p{index}" for index in range(208)]
    return dict(zip(names, phantoms)), make_test_records(names, phantoms)


@pytest.mark.parametrize("seed", range(5))
def test_test_split_shows_only_combinations_that_training_never_shows(seed):
    train = draw_facts(3000, seed, held_out=False, normal_share=0.1, stream=0)
    test = draw_facts(160, seed, held_out=True, normal_share=0.0, stream=1)
    assert not set(train) & set(test)
    assert len(set(test)) == 20
    seen = {p for p in train if not p.is_normal}
    assert len(seen) == 300, "training shows every other combination"


@pytest.mark.parametrize("seed", range(8))
def test_held_out_combinations_are_balanced(seed):
    held = [p for p in all_combinations() if is_held_out(p, seed)]
    assert Counter((p.domain, p.kind) for p in held) == {(d, k): 1 for d in range(5) for k in range(4)}
    for fact in ("side", "place", "size", "number"):
        assert sum(getattr(p, fact) for p in held) == 10
    other = [p for p in all_combinations() if is_held_out(p, seed + 1)]
    assert set(held) != set(other)


def test_every_template_is_asked_often_and_its_answers_are_balanced(test_split):
    _, records = test_split
    assert len(TEMPLATES) >= 25
    finding = [record for record in records if record["finding"]]
    assert len(finding) >= 1000
    assert min(Counter(record["family"] for record in finding).values()) >= 80
    answers = defaultdict(Counter)
    for record in records:
        answers[record["template"]][record["conversations"][1]["value"]] += 1
    assert set(answers) == {template.name for template in TEMPLATES}
    for name, counts in answers.items():
        assert max(counts.values()) - min(counts.values()) <= 2, (name, counts)


def test_what_a_closed_question_names_tells_nothing(test_split):
    """Given its text, a yes/no question is answered yes as often as no, and no option is right more often."""
    _, records = test_split
    by_text = defaultdict(Counter)
    for record in records:
        if record["answer_type"] == "CLOSED":
            question, answer = (turn["value"] for turn in record["conversations"])
            options = [" ".join(words) for words in question_options(question)]
            text = (record["template"], frozenset(options)) if options else question
            by_text[text][answer.lower()] += 1
    guessed = sum(max(counts.values()) for counts in by_text.values())
    assert guessed / sum(map(Counter.total, by_text.values())) < 0.58


def test_answers_are_true(test_split):
    phantoms, records = test_split
    for record in records:
        phantom = phantoms[record["image"].removesuffix(".png")]
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in record["conversations"])
        fact, form = next((t.fact, t.form) for t in TEMPLATES if t.name == record["template"])
        truth = value_of(fact, phantom)
        words = {"one": "only one"}.get(truth, truth) if form == YES_NO else truth
        if form == YES_NO:
            named = f" {words}" in question.rstrip("?") + " " and not (words == "normal" and "abnormal" in question)
            assert answer == ("yes" if named else "no"), question
        else:
            assert answer == truth
        if form == CHOICE:
            assert truth in question
        assert strict_item(answer, answer, question).correct == 1.0


def test_a_conversation_asks_about_a_fact_once():
    random, dealer = np.random.default_rng(0), Dealer()
    facts_of = {template.text: template.fact for template in TEMPLATES}
    for phantom in draw_facts(200, 0, held_out=False, normal_share=0.1, stream=0):
        record = conversation_record("a", "a", phantom, dealer, random)
        questions = [turn["value"] for turn in record["conversations"][::2]]
        assert questions[0].startswith("<image>\n") and not any("<image>" in text for text in questions[1:])
        facts = [facts_of[text] for text in questions[1:] if text in facts_of]
        assert len(facts) == len(set(facts))


def test_an_assistants_answer_states_the_fact_and_scores_as_the_bare_one():
    dealer = Dealer()
    phantom = Phantom(0, 0, side=1)
    question = next(
        question
        for template in templates_of("side", YES_NO) * 2
        if (question := dealer.ask(template, phantom)).answer == "no"
    )
    assert spoken(question) == "It is on the right side. So left: no."
    assert strict_item(spoken(question), "no").correct == 1.0


def test_a_finding_changes_the_image_where_it_is_said_to_be():
    for domain in range(len(DOMAINS)):
        for side in (0, 1):
            for place in (0, 1):
                phantom = Phantom(domain, 1, side, place, size=1, number=0)
                # The same random numbers up to the finding's own: exposure and noise differ, so means are compared.
                shown = np.mean([_difference(phantom, seed) for seed in range(6)], axis=0)
                x, y = CENTERS[DOMAINS[domain].key]
                column = int((1 + (x if side else -x)) / 2 * 4 * 0.999)
                row = int((1 + (y if place else -y)) / 2 * 4 * 0.999)
                strongest = np.unravel_index(shown.argmax(), shown.shape)
                assert abs(strongest[0] - row) <= 1 and (strongest[0] >= 2) == bool(place), (phantom, shown)
                assert abs(strongest[1] - column) <= 1 and (strongest[1] >= 2) == bool(side), (phantom, shown)


def _difference(phantom: Phantom, seed: int) -> np.ndarray:
    """Mean local contrast in 4 x 4 cells, beyond that of normal images."""

    def contrast(one: Phantom) -> np.ndarray:
        images = draw([one] * 8, 64, np.random.default_rng(seed)).astype(float).mean(-1)
        return np.abs(images - np.median(images, axis=(1, 2), keepdims=True)).mean(0)

    change = np.abs(contrast(phantom) - contrast(Phantom(phantom.domain, None)))
    return change.reshape(4, 16, 4, 16).mean((1, 3))


def test_images_follow_from_the_seed_and_vary():
    phantoms = [Phantom(domain, 0) for domain in range(5)] * 2
    first = draw(phantoms, 48, np.random.default_rng(5))
    assert first.shape == (10, 48, 48, 3) and first.dtype == np.uint8
    assert np.array_equal(first, draw(phantoms, 48, np.random.default_rng(5)))
    assert not np.array_equal(first[:5], first[5:]), "the same facts never give the same image"
    assert (first.std((1, 2, 3)) > 10).all()


def test_files_are_written_and_seeds_share_no_image(tmp_path):
    counts = Counts(train=12, test=6, conversations=5, vqa=8, text=10)
    written = write_phantoms(tmp_path / "a", 1, counts, size=48, processes=1)
    write_phantoms(tmp_path / "b", 2, counts, size=48, processes=1)
    assert written["captions.json"] == 12 and written["conversations.json"] == 5 and written["vqa_train.json"] == 8
    images = {seed: {p.read_bytes() for p in (tmp_path / seed / "images").iterdir()} for seed in "ab"}
    assert len(images["a"]) == len(images["b"]) == 18 and not images["a"] & images["b"]
    record = read_records(tmp_path / "a" / "captions.json")[0]
    assert sum(record["domain"].values()) == 1 and set(record["domain"]) == {domain.key for domain in DOMAINS}
    with Image.open(tmp_path / "a" / "images" / record["image"]) as image:
        assert image.size == (48, 48) and image.mode == "RGB"
    items = read_vqa_items(tmp_path / "a" / "vqa_test.json")
    assert {item.answer_type for item in items} == {"OPEN", "CLOSED"} and not any(i.type_inferred for i in items)
    assert all("image" not in record for record in read_records(tmp_path / "a" / "text.json"))


def test_counts_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(LlavaError, match="at most as many as train"):
        write_phantoms(tmp_path / "a", counts=Counts(train=4, vqa=5, conversations=1), processes=1)
    with pytest.raises(LlavaError, match="at least 32"):
        write_phantoms(tmp_path / "a", size=8, processes=1)
    with pytest.raises(LlavaError, match="--vqa -1: give 0 or more"):
        write_phantoms(tmp_path / "a", counts=Counts(train=4, vqa=-1, conversations=1), processes=1)
    with pytest.raises(LlavaError, match="--processes 0: give 1 or more"):
        write_phantoms(tmp_path / "a", processes=0)


def test_the_command_and_the_function_draw_as_many_if_not_told(tmp_path):
    args = build_parser().parse_args(["--output-dir", str(tmp_path)])
    assert {name: getattr(args, name) for name in asdict(Counts())} == asdict(Counts())
