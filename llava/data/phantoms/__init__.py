"""The built-in set: images drawn by the program in LLaVA-Med's five domains, with findings that only they tell.

`write_phantoms(folder, …)` makes all of it: images, captions (stage 1), conversations (stage 2), VQA questions,
and text alone for a language model. `python -m llava.data.phantoms` is the same as a command.
"""

from llava.data.phantoms.build import Counts, write_phantoms
from llava.data.phantoms.findings import DOMAINS, Phantom, draw_facts, is_held_out
from llava.data.phantoms.questions import TEMPLATES

ABOUT = "drawn images alone: the built-in set of llava.data.phantoms"
"""What a checkpoint says that was trained on it (`--data_description`)."""

__all__ = ["ABOUT", "DOMAINS", "TEMPLATES", "Counts", "Phantom", "draw_facts", "is_held_out", "write_phantoms"]
