"""How the web page looks: gradio's theme, the page's own style sheet, and the script of the whole page."""

from pathlib import Path

import gradio as gr

from llava.serve.web.uploads import MAX_FILE_BYTES

_ASSETS = Path(__file__).parent / "assets"
CSS = (_ASSETS / "page.css").read_text("utf-8")
HEAD = f"<script>const MOST_BYTES = {MAX_FILE_BYTES};\n{(_ASSETS / 'desk.js').read_text('utf-8')}</script>"


def page_theme() -> gr.themes.Base:
    """Quiet colours, and the fonts that the reader's system has: nothing is fetched."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        radius_size="sm",
        spacing_size="sm",
    ).set(
        # Contrast of 4.5 and more, also of what is said by the way.
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )
