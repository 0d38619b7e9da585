"""What the writing model is told: the task, and worked examples as earlier turns of the chat.

The protocol is LLaVA-Med's (paper, section 3 and its appendix); the wording and the examples are this project's own.
"""

from llava.instruct.figures import Figure

TASK = """\
You write conversations between a person (User) and an assistant who looks at a medical image (Assistant).
You are not shown the image. You get the caption of a figure from a scientific article and, in some cases, the
sentences of the article that mention the figure. Write as if both speakers had the image before them and nothing
else.

Rules:
- Speak of what the image shows. Never say caption, context, figure text, article, mention or description, and
  never hint that there was a text.
- Don't quote particular facts, terms, abbreviations, dates, numbers or names that nobody could see in the image.
- Ask varied questions: kind of image, part of the body, what is visible, where it is, how it looks, how parts
  compare. Ask only what the text lets you answer.
- The assistant is careful: no medical advice, no treatment, no certainty that an image alone can't give.
- Two or three questions at least; more where the text carries more.
- Write nothing but the conversation. Each line starts with "User:" or "Assistant:", in turn, User first."""

WITH_MENTIONS = "\nThe sentences from the article add to the caption; use what they say about the picture, no more."

# (figure, conversation); the first has no sentences from an article, the second has.
EXAMPLES: tuple[tuple[Figure, str], ...] = (
    (
        Figure(
            key="example-1",
            label="Figure 2",
            caption=(
                "Frontal chest radiograph of a 54-year-old man, obtained on admission (March 2011), showing a "
                "rounded opacity in the right lower zone and blunting of the right costophrenic angle. "
                "The left lung is clear."
            ),
            domains=("chest_xray",),
        ),
        "User: What kind of picture is this?\n"
        "Assistant: This is a radiograph of the chest, taken from the front.\n"
        "User: Do both lungs look alike?\n"
        "Assistant: No. The left lung looks clear, while the right one has a rounded, whiter area in its lower part.\n"
        "User: Is there anything else on the right side?\n"
        "Assistant: The angle between the ribs and the diaphragm looks blunted there, which may go with a small "
        "amount of fluid. Other views or examinations would be needed to say more.",
    ),
    (
        Figure(
            key="example-2",
            label="Fig. 4B",
            caption="Section through the resected nodule (H&E, ×200).",
            mentions=(
                "The nodule consisted of nests of uniform cells with round nuclei (Fig. 4B).",
                "Thin bands of fibrous tissue separated the nests, and mitoses were rare (Fig. 4B).",
            ),
            domains=("histology",),
        ),
        "User: What am I looking at?\n"
        "Assistant: A stained section of tissue under the microscope; the pink and purple colours are typical of a "
        "hematoxylin and eosin stain.\n"
        "User: How are the cells arranged?\n"
        "Assistant: They lie in nests. Thin bands of fibrous tissue run between the nests.\n"
        "User: Do the cells differ much from each other?\n"
        "Assistant: They look rather uniform, with round nuclei, and few of them seem to be dividing.",
    ),
)


def build_messages(figure: Figure, use_mentions: bool) -> list[dict]:
    """Chat messages that ask for one figure's conversation, the worked examples before it."""
    messages = [{"role": "system", "content": TASK + (WITH_MENTIONS if use_mentions else "")}]
    for example, conversation in EXAMPLES:
        messages.append({"role": "user", "content": describe(example, use_mentions)})
        messages.append({"role": "assistant", "content": conversation})
    messages.append({"role": "user", "content": describe(figure, use_mentions)})
    return messages


def describe(figure: Figure, use_mentions: bool) -> str:
    """The text about a figure, as the writing model gets it."""
    label = figure.label or "Figure"
    lines = [f"{label} caption:", f"{label}: {figure.caption.strip()}"]
    if use_mentions and figure.mentions:
        lines += ["", f"{label} in the article:", *(f"- {mention.strip()}" for mention in figure.mentions)]
    return "\n".join(lines)
