"""Question templates about a phantom, and the dealing of answers so that each template's are balanced.

`TEMPLATES` is the list; `Dealer.ask(template, phantom)` fills one in. What a yes/no question names, and the other
option of a choice, go round in turn, so that without the image no answer is likelier than another.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llava.data.phantoms.findings import DOMAINS, NUMBERS, PLACES, SIDES, SIZES, Phantom

OPEN, YES_NO, CHOICE = "open", "yes_no", "choice"
FINDING_FACTS = ("kind", "side", "place", "where", "size", "number", "normality")
IMAGE_FACTS = ("modality", "organ")


@dataclass(frozen=True)
class Template:
    """`text` holds `{value}` where a yes/no question names something. `number` tells templates of a family apart."""

    fact: str
    form: str
    number: int
    text: str

    @property
    def family(self) -> str:
        return f"{self.fact}_{self.form}"

    @property
    def name(self) -> str:
        return f"{self.family}_{self.number}"

    @property
    def is_finding(self) -> bool:
        """Whether it asks about a finding; modality and organ are told by the whole image."""
        return self.fact in FINDING_FACTS


@dataclass(frozen=True)
class Question:
    """A filled template. `statement` says the fact in a sentence; `named` is what a yes/no question asks about."""

    template: Template
    text: str
    answer: str
    statement: str
    named: str = ""


_TEXTS = {
    ("kind", OPEN): ("What is the finding?", "Which abnormality is seen?", "What does the picture show?"),
    ("side", OPEN): ("On which side is the finding?", "Which side is affected?", "Is it left or right?"),
    ("place", OPEN): ("At which height is the finding?", "Which half is affected?", "Is it upper or lower?"),
    ("where", OPEN): ("Where is the finding?", "In which quarter does it lie?"),
    ("size", OPEN): ("How big is the finding?", "What is its size?", "Is it small or large?"),
    ("number", OPEN): ("How many findings are there?", "What is their number?", "Is there one or several?"),
    ("kind", YES_NO): ("Is there a {value}?", "Is the finding a {value}?", "Does the picture show a {value}?"),
    ("side", YES_NO): ("Is the finding on the {value} side?", "Does it lie on the {value}?"),
    ("place", YES_NO): ("Is the finding in the {value} half?", "Does it lie in the {value} part?"),
    ("size", YES_NO): ("Is the finding {value}?", "Does it look {value}?"),
    ("number", YES_NO): ("Does the picture show {value}?", "Do you see {value}?"),
    ("normality", YES_NO): ("Is the picture {value}?", "Does it look {value}?"),
    ("kind", CHOICE): ("Which finding is it?",),
    ("side", CHOICE): ("Which side is it?",),
    ("place", CHOICE): ("Which half is it?",),
    ("size", CHOICE): ("Which size is it?",),
    ("number", CHOICE): ("Which number is it?",),
    ("modality", OPEN): ("What kind of picture is this?", "What is the modality?"),
    ("organ", OPEN): ("Which organ is shown?", "What part of the body is this?"),
    ("modality", YES_NO): ("Is this a {value}?",),
    ("organ", YES_NO): ("Is this the {value}?",),
}

TEMPLATES = tuple(
    Template(fact, form, number, text) for (fact, form), texts in _TEXTS.items() for number, text in enumerate(texts, 1)
)

OPTIONS = " Please choose from the following two options: [{}, {}]"
"""How the released VQA files put a choice."""


def templates_of(fact: str, form: str | None = None) -> list[Template]:
    """The templates that ask about a fact (in one form)."""
    return [t for t in TEMPLATES if t.fact == fact and form in (None, t.form)]


def value_of(fact: str, phantom: Phantom) -> str:
    """The word or words that a fact has in a phantom, such as "left" or "upper left"."""
    domain = DOMAINS[phantom.domain]
    if fact == "modality":
        return domain.modality
    if fact == "organ":
        return domain.organ
    if fact == "normality":
        return "normal" if phantom.is_normal else "abnormal"
    if fact == "kind":
        return domain.kinds[phantom.finding]
    if fact == "where":
        return f"{PLACES[phantom.place]} {SIDES[phantom.side]}"
    words = {"side": SIDES, "place": PLACES, "size": SIZES, "number": NUMBERS}[fact]
    return words[getattr(phantom, fact)]


def alternatives(fact: str, phantom: Phantom) -> Sequence[str]:
    """What a fact could have been instead; a kind's alternatives are those of the same domain."""
    if fact == "kind":
        every: Sequence[str] = DOMAINS[phantom.domain].kinds
    elif fact in IMAGE_FACTS:
        every = [getattr(domain, fact) for domain in DOMAINS]
    else:
        every = {
            "side": SIDES,
            "place": PLACES,
            "size": SIZES,
            "number": NUMBERS,
            "normality": ("normal", "abnormal"),
        }[fact]
    own = value_of(fact, phantom)
    return [value for value in every if value != own]


def statement(fact: str, phantom: Phantom) -> str:
    """The fact as a sentence of a caption."""
    value = value_of(fact, phantom)
    sentences = {
        "kind": f"There is {with_article(value)}.",
        "side": f"It is on the {value} side.",
        "place": f"It is in the {value} half.",
        "where": f"It is in the {value} quarter.",
        "size": f"It is {value}.",
        "number": "There is one finding." if value == NUMBERS[0] else "There are several findings.",
        "normality": f"The picture is {value}.",
        "modality": f"This is {with_article(value)}.",
        "organ": f"It shows the {value}.",
    }
    return sentences[fact]


def with_article(noun: str) -> str:
    """The noun with a or an: "a nodule", "an abscess", "an MRI scan"."""
    return f"an {noun}" if noun[0] in "aeiouMR" and not noun.startswith("u") else f"a {noun}"


class Dealer:
    """Fills templates in. Of the questions of one template about one fact's value, every second names the truth.

    What stands in place of the truth goes round the alternatives, and the truth's place among two options
    changes from one to the next.
    """

    def __init__(self) -> None:
        self._asked: Counter[tuple[str, str]] = Counter()

    def ask(self, template: Template, phantom: Phantom) -> Question:
        fact, truth = template.fact, value_of(template.fact, phantom)
        turn = self._asked[template.name, truth]
        self._asked[template.name, truth] += 1
        if fact == "kind":
            # A kind is asked about so seldom that the first questions matter: every other kind begins with a yes.
            turn += phantom.finding + phantom.domain
        said = statement(fact, phantom)
        if template.form == OPEN:
            return Question(template, template.text, truth, said)
        others = alternatives(fact, phantom)
        other = others[(turn // 2) % len(others)]
        if template.form == CHOICE:
            options = (truth, other) if turn % 2 else (other, truth)
            return Question(template, template.text + OPTIONS.format(*options), truth, said)
        named = truth if turn % 2 else other
        answer = "yes" if named == truth else "no"
        return Question(template, _fill(template.text, fact, named), answer, said, named)


_NAMED_NUMBER = {"one": "only one finding", "several": "several findings"}


def _fill(text: str, fact: str, value: str) -> str:
    if fact == "number":
        return text.format(value=_NAMED_NUMBER[value])
    if "a {value}" in text:
        return text.replace("a {value}", with_article(value))
    return text.format(value=value)
