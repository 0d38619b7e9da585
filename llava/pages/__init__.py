"""Self-contained HTML pages: one template and theme, and figures that follow it."""

from llava.pages.page import (
    Card,
    figure,
    figures,
    folded,
    gallery,
    note,
    page_text,
    picture,
    preformatted,
    subheading,
    table,
    warning,
    what_was_run,
    write_page,
)
from llava.pages.printing import print_page, printing_browser

__all__ = [
    "Card",
    "figure",
    "figures",
    "folded",
    "gallery",
    "note",
    "page_text",
    "picture",
    "preformatted",
    "print_page",
    "printing_browser",
    "subheading",
    "table",
    "warning",
    "what_was_run",
    "write_page",
]
