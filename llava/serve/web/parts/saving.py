"""The page's buttons that save a conversation as JSON or as a page, and open one again."""

import asyncio
import json
from pathlib import Path
from typing import Any

import gradio as gr

from llava.serve.web.chat_state import Chat
from llava.serve.web.exports import as_json, as_page

DOWNLOAD = (Path(__file__).parents[1] / "assets/download.js").read_text("utf-8")
CHOOSE = '() => document.querySelector("#box input[type=file]").click()'
ABOUT = """<h2>Save the conversation</h2><p>With the date, the models, how answers were made, slices and windows, and
the SHA-256 of each image. The page holds the images as they were looked at and needs nothing else; the JSON holds
none.</p>"""
FORMS = {
    "export": ("Export as JSON", "conversation.json", "application/json", as_json),
    "export-page": ("Export as a page", "conversation.html", "text/html", as_page),
}


class SavingPart:
    """An export is opened as other files are, through the question's box."""

    def __init__(self):
        gr.HTML(ABOUT)
        self.buttons = {
            name: gr.Button(words, size="sm", elem_id=name, min_width=0) for name, (words, *_) in FORMS.items()
        }
        self.reopen = gr.Button("Open an export", size="sm", elem_id="reopen", min_width=0)
        self.exported = gr.Textbox(visible="hidden", elem_id="exported")

    def connect(self, chat: gr.State, quiet: dict[str, Any]) -> None:
        for name, button in self.buttons.items():
            button.click(self._handler(name), chat, self.exported, **quiet).success(
                None, self.exported, None, js=DOWNLOAD, **quiet
            )
        self.reopen.click(None, None, None, js=CHOOSE, **quiet)

    def _handler(self, form: str):
        _, name, kind, write = FORMS[form]

        async def on_export(chat: Chat):
            if not chat.exchanges:
                raise gr.Error("There is nothing to export yet.", title="Export", print_exception=False)
            # Beside the event loop: with 32 images it takes seconds.
            content = await asyncio.to_thread(write, chat)
            return json.dumps({"name": name, "kind": kind, "content": content})

        return on_export
