"""Examples of the page for a model of the demo: images of the built-in set's kind, drawn when asked for, of nobody.

Other models get none: a drawn image isn't what they were made for.
"""

import base64
import functools
import html
import io

import numpy as np
from PIL import Image

from llava.data.phantoms import Phantom
from llava.data.phantoms.drawing import draw

SIZE = 336
EXAMPLES = (
    ("chest", Phantom(0, 0, side=0, place=0, size=1), "On which side is the finding?"),
    ("slice", Phantom(1, 1, side=1, place=1, size=1), "Which abnormality is seen?"),
    ("tissue", Phantom(3, 2, side=1, place=0, size=1), "Does the picture look normal?"),
)
"""Names, what is drawn, and a question."""
SCRIPT = """
element.addEventListener("click", (event) => {
  const card = event.target.closest("button[data-example]");
  if (card) { trigger("select", {index: Number(card.dataset.example), value: ""}); }
});"""


@functools.cache
def draw_example(name: str) -> bytes:
    """PNG bytes of one of `EXAMPLES`."""
    number, phantom = next((n, phantom) for n, (each, phantom, _) in enumerate(EXAMPLES) if each == name)
    (pixels,) = draw([phantom], SIZE, np.random.default_rng(number))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def examples_html() -> str:
    """A card for each example."""
    cards = "".join(
        f'<button type="button" id="example-{name}" data-example="{number}">'
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(draw_example(name)).decode()}">'
        f"<span>{html.escape(question)}</span></button>"
        for number, (name, _, question) in enumerate(EXAMPLES)
    )
    return f'<p>Drawn images, as this model knows them:</p><div class="cards">{cards}</div>'
