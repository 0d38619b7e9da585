"""Self-contained HTML pages: one template and theme, and figures that follow it."""

from llava.pages.page import Card, cards, figure, figures, note, preformatted, subheading, table, write_page

__all__ = ["Card", "cards", "figure", "figures", "note", "preformatted", "subheading", "table", "write_page"]
