"""What a visitor adds: files become images and scans of the conversation as soon as they are there.

A file that is refused is said, and no question goes until the visitor has added another one or chosen to ask without.
"""

import asyncio
import functools
import html
from pathlib import Path
from typing import Any

import gradio as gr

from llava.errors import LlavaError
from llava.serve.decoding.pool import in_thread
from llava.serve.job import MAX_IMAGES
from llava.serve.protocol import ServeError
from llava.serve.web.chat_state import LARGE, SIDES, Chat, UploadedImage, text_length
from llava.serve.web.exports import is_export, read_export
from llava.serve.web.middleware import visitor_of
from llava.serve.web.parts.scan_view import ScanPart, draft_of, is_scan

UPLOAD_SECONDS = 60.0
"""For the images of one question, with waiting for those of others."""
GONE = "A file is no longer kept. Add it again."
MOST_REFUSED = 8
MOST_WORDS = 300
# Typing changes the box too, and stays in the browser: the server is asked only where there is another file.
NOTICE_FILES = """(box) => {
  const files = (box?.files ?? []).map((file) => file.path).join("\\n");
  if (files && files !== window.llavaFiles) { document.querySelector("#take").click(); }
  window.llavaFiles = files;
}"""
KEEP_OTHERS = """(box, taken) => {
  delete document.body.dataset.uploading;
  return {text: box?.text ?? "", files: (box?.files ?? []).filter((file) => !taken.split("\\n").includes(file.path))};
}"""
# The browser refuses some files itself, as those that are too large: assets/desk.js tells of them by an event.
SCRIPT = """
window.addEventListener("llava-refused", (event) => trigger("select", {index: 1, value: event.detail}));
element.addEventListener("click", (event) => {
  if (event.target.closest("button")) { trigger("select", {index: 0, value: ""}); }
});"""


class Incoming:
    """The components that take files, and their handlers."""

    def __init__(self, scans: ScanPart):
        self.scans, self.budget = scans, scans.budget
        self.open = functools.partial(scans.pool.open, longest=LARGE)
        self.refused = gr.HTML("", elem_id="refused", js_on_load=SCRIPT, apply_default_css=False)
        self.came = gr.Button(visible="hidden", elem_id="take")
        self.taken = gr.Textbox(visible="hidden", elem_id="taken")

    def connect(
        self, chat: gr.State, box: Any, draft: gr.HTML, model: gr.Dropdown, views: list[Any], quiet: dict[str, Any]
    ) -> None:
        box.change(None, box, None, js=NOTICE_FILES, **quiet)
        changed = [self.taken, self.refused, draft, *views, *self.scans.controls]
        self.came.click(self.on_files, [chat, box, model], changed, **quiet).then(
            None, [box, self.taken], box, js=KEEP_OTHERS, **quiet
        ).then(self.on_taken, chat, None, **quiet)
        self.refused.select(self.on_refused, chat, self.refused, **quiet)

    async def on_files(self, chat: Chat, box: dict, model: str | None, request: gr.Request):
        files, before = box["files"] or [], len(chat.exchanges)
        await self.take(chat, files, request)
        if chat.is_cleared:
            return ["\n".join(files), *[gr.skip()] * (2 + SIDES + len(self.scans.controls))]
        is_reopened = len(chat.exchanges) != before
        views = [chat.shown(side) if is_reopened else gr.skip() for side in range(SIDES)]
        return ["\n".join(files), refusal_of(chat), draft_of(chat), *views, *await self.scans.shown(chat, model)]

    async def on_taken(self, chat: Chat) -> None:
        """The box shows the files no more, so they can go: a conversation lives in memory alone."""
        for file in chat.taken:
            Path(file).unlink(missing_ok=True)

    async def on_refused(self, chat: Chat, event: gr.SelectData):
        if event.index:
            _note(chat, str(event.value))
        else:
            chat.refused = []
        return refusal_of(chat)

    async def take(self, chat: Chat, files: list[str], request: gr.Request) -> None:
        """Read a visitor's uploads into the chat; a line of `chat.refused` says of each what is wrong."""
        new = [file for file in files if file not in chat.taken]
        if not new:
            return
        chat.taken.update(new)
        chat.reading += 1
        try:
            scans = [file for file in new if is_scan(file)]
            refused = [words for file in new if file not in scans if (words := await self._take_image(chat, file))]
            contents = []
            for path in map(Path, scans):
                try:
                    contents.append((path.name, path.read_bytes()))
                    path.unlink()  # a conversation lives in memory alone
                except FileNotFoundError:
                    refused.append(GONE)
            try:
                refused += await self.scans.take(chat, contents, _visitor(request))
            except (LlavaError, ServeError) as error:
                refused.append(str(error))
            more = len(refused) - (MOST_REFUSED - 1)
            if more > 1:
                refused[-more:] = [f"and {more} more of {len(new)} files"]
            chat.refused = []
            for words in refused:
                _note(chat, words)
        finally:
            chat.reading -= 1

    async def _take_image(self, chat: Chat, file: str) -> str:
        """Words on why it is refused, or ""."""
        if len(chat.images()) >= MAX_IMAGES:
            return f"A conversation holds at most {MAX_IMAGES} images. Clear it first."
        try:
            content = Path(file).read_bytes()
            if is_export(content):
                Path(file).unlink(missing_ok=True)
                return await self._reopen(chat, content)
            image = await in_thread(self._read_image, content, seconds=UPLOAD_SECONDS)
        except FileNotFoundError:
            return GONE
        except (LlavaError, ServeError) as error:
            return f"{Path(file).name}: {error}"
        chat.draft.append(image)
        chat.looked = None if not chat.scans else len(chat.images()) - 1
        return ""

    async def _reopen(self, chat: Chat, content: bytes) -> str:
        """A conversation that was exported takes the place of an empty one."""
        if chat.exchanges:
            return "An export is opened in an empty conversation: clear this one first."
        exchanges, missing = await in_thread(read_export, content, self.open, seconds=UPLOAD_SECONDS)
        for image in (image for exchange in exchanges for image in exchange.images):
            self.budget.take(image, image.size)
        for exchange in exchanges:
            self.budget.take_text(exchange, text_length([exchange]))
        chat.exchanges = exchanges
        if missing:
            gr.Warning(f"{missing} of its images aren't in the file: questions go on without them.")
        return ""

    def _read_image(self, content: bytes) -> UploadedImage:
        image = UploadedImage.from_bytes(content, self.open)
        self.budget.take(image, image.size)
        return image


async def all_read(chat: Chat) -> None:
    """Return once no upload of the chat is being read."""
    while chat.reading:
        await asyncio.sleep(0.02)


def _visitor(request: gr.Request) -> str:
    """Whose browser it came from."""
    return visitor_of(request.request.scope if request.request else {"headers": []})


def refusal_of(chat: Chat) -> str:
    """HTML of what was refused, with the button that asks without it."""
    if not chat.refused:
        return ""
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in chat.refused)
    return (
        f'<div role="alert"><p><b>Refused; your question hasn\'t been sent.</b></p>{lines}'
        '<button type="button">Go on without it</button></div>'
    )


def _note(chat: Chat, words: str) -> None:
    if len(chat.refused) < MOST_REFUSED:
        chat.refused.append(words[:MOST_WORDS])
