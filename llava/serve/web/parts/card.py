"""The card of a model: what it is and what it was trained on, as its worker says."""

import html

from llava.constants import RESEARCH_NOTICE
from llava.data.phantoms import ABOUT
from llava.serve.request_models import ModelCard

FIELDS = {
    "base": "Made from",
    "language_model": "Language model",
    "tower": "Vision tower",
    "template": "Prompt template",
    "context": "Context",
    "trained_on": "Trained on",
    "training": "Last training",
}
UNKNOWN = "not told by the checkpoint"


def knows_drawn_only(card: ModelCard | None) -> bool:
    """Whether it is a model of the demo, trained on the built-in images alone."""
    return card is not None and card.trained_on == ABOUT


def card_html(models: dict[str, ModelCard | None]) -> str:
    """HTML of the chosen models' cards."""
    return "".join(_one(name, card or ModelCard()) for name, card in models.items())


def _one(name: str, card: ModelCard) -> str:
    rows = "".join(
        f"<dt>{words}</dt><dd>{html.escape(getattr(card, field) or UNKNOWN)}</dd>" for field, words in FIELDS.items()
    )
    warned = ""
    if knows_drawn_only(card):
        warned = (
            '<p class="warned"><b>It knows drawn images only.</b> What it says of any other image means nothing.</p>'
        )
    return f"<h2>{html.escape(name)}</h2>{warned}<dl>{rows}</dl><p>{html.escape(RESEARCH_NOTICE)}</p>"
