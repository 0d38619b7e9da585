"""The page's part for DICOM and NIfTI files: which slice and which grey window go with the question, and a preview.

The preview is what the model's vision tower gets, asked of the worker; without one, the image as it is opened.
"""

import functools
import html
import logging
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from llava.errors import ImageError, LlavaError
from llava.image_options import AXES, CT_WINDOWS
from llava.images import png_data_url
from llava.images.opening import image_kind
from llava.serve.client import ServingClient
from llava.serve.decoding.pool import DecodingPool, in_thread
from llava.serve.protocol import ServeError
from llava.serve.web.chat_state import Chat, UploadedImage, thumbnails
from llava.serve.web.memory_budget import MemoryBudget
from llava.serve.web.scans import Scan, read_scans, size_of

logger = logging.getLogger(__name__)

OF_THE_FILE, OWN = "as the file says", "own values"
READ_SECONDS = 120.0
"""For the files of one upload, with waiting for those of others."""
LOOK_SECONDS = 20.0
SHOWN_SIZE = 384  # pixels of the longer side of a view that no worker has made smaller
# Typing changes the box too, and stays in the browser: the server is asked only where there is another file.
NOTICE_FILES = """(box) => {
  const files = (box?.files ?? []).map((file) => file.path).join("\\n");
  if (files && files !== window.llavaFiles) { document.querySelector("#take").click(); }
  window.llavaFiles = files;
}"""
KEEP_OTHERS = """(box, taken) => ({
  text: box?.text ?? "",
  files: (box?.files ?? []).filter((file) => !taken.split('\\n').includes(file.path))
})"""


class ScanPart:
    """Its components and handlers; the scans of a visitor are in his chat."""

    def __init__(self, client: ServingClient, pool: DecodingPool, budget: MemoryBudget):
        self.client, self.pool, self.budget = client, pool, budget
        with gr.Column(visible=False, elem_id="scan") as self.part, gr.Row():
            with gr.Column(min_width=280):
                self.preview = gr.HTML(elem_id="scan-preview")
                self.state = gr.HTML(elem_id="scan-state")
            with gr.Column(min_width=280):
                self.which = gr.Dropdown([], label="Scan", visible=False, elem_id="scan-which")
                self.place = gr.Slider(0, 1, 0, step=1, label="Slice", elem_id="scan-place")
                self.axis = gr.Radio(
                    [(name, number) for number, name in enumerate(AXES)],
                    value=2,
                    label="Plane",
                    elem_id="scan-axis",
                )
                self.preset = gr.Dropdown(
                    [OF_THE_FILE, *CT_WINDOWS, OWN], value=OF_THE_FILE, label="Window", elem_id="scan-preset"
                )
                self.centre = gr.Slider(0, 1, 0, label="Window centre", elem_id="scan-centre")
                self.width = gr.Slider(0, 1, 1, label="Window width", elem_id="scan-width")
                with gr.Row():
                    self.add = gr.Button("Keep this view, add another", size="sm", elem_id="scan-add")
                    self.remove = gr.Button("Remove", size="sm", elem_id="scan-remove")
        self.came = gr.Button(visible="hidden", elem_id="take")
        self.taken = gr.Textbox(visible="hidden", elem_id="taken")

    @property
    def controls(self) -> list[Any]:
        return [self.part, self.which, self.place, self.axis, self.preset, self.centre, self.width, *self.seen]

    @property
    def seen(self) -> list[Any]:
        """What changes with the view."""
        return [self.preview, self.state]

    def connect(self, chat: gr.State, box: Any, draft: gr.HTML, model: gr.Dropdown, quiet: dict[str, Any]) -> None:
        box.change(None, box, None, js=NOTICE_FILES, **quiet)
        self.came.click(self.on_files, [chat, box, model], [self.taken, *self.controls], **quiet).then(
            None, [box, self.taken], box, js=KEEP_OTHERS, **quiet
        )
        model.change(self.on_model, [chat, model], self.seen, **quiet)
        self.which.input(self.on_which, [chat, self.which, model], self.controls, **quiet)
        self.axis.input(self.on_axis, [chat, self.axis, model], self.controls, **quiet)
        self.preset.input(self.on_preset, [chat, self.preset, self.centre, self.width, model], self.controls, **quiet)
        # Of a slider that is drawn along only the last place matters.
        drawn = {**quiet, "trigger_mode": "always_last"}
        self.place.input(self.on_place, [chat, self.place, model], self.seen, **drawn)
        for slider in (self.centre, self.width):
            slider.input(self.on_window, [chat, self.centre, self.width, model], [self.preset, *self.seen], **drawn)
        self.add.click(self.on_add, chat, [draft, self.state], **quiet)
        self.remove.click(self.on_remove, [chat, model], self.controls, **quiet)

    async def on_files(self, chat: Chat, box: dict, model: str | None):
        """Take the scans out of the question's box; images of other kinds stay there."""
        scans = [path for path in box["files"] or [] if path not in chat.taken and is_scan(path)]
        try:
            await self.take(chat, scans)
        except (LlavaError, ServeError) as error:
            gr.Warning(f"The image can't be used. {error}")
        if not chat.scans:
            return ["\n".join(scans), *[gr.skip()] * len(self.controls)]
        return ["\n".join(scans), *await self._shown(chat, model)]

    async def take(self, chat: Chat, paths: list[str]) -> None:
        """Read uploads that are scans, which are deleted, into the chat.

        Raises:
            LlavaError, ServeError: they can't be read.
        """
        chat.taken.update(paths)
        chat.reading += 1
        try:
            contents = [take_file(path) for path in paths]
            scans = await in_thread(read_scans, contents, self.pool, seconds=READ_SECONDS) if contents else []
            for scan in scans:
                self.budget.take(scan, size_of(scan))
        finally:
            chat.reading -= 1
        if scans:
            chat.current = len(chat.scans)
            chat.scans += scans

    async def views(self, chat: Chat) -> list[UploadedImage]:
        """The chosen views, which a question is asked about.

        Raises:
            LlavaError, ServeError: one can't be opened.
        """
        wanted = [scan for scan in chat.scans if scan.is_wanted]
        return [await self._view(scan) for scan in wanted]

    async def on_model(self, chat: Chat, model: str | None):
        return await self._seen(chat, model) if chat.scans else [gr.skip()] * 2

    async def on_which(self, chat: Chat, which: int, model: str | None):
        if not isinstance(which, int) or not 0 <= which < len(chat.scans):
            return [gr.skip()] * len(self.controls)
        chat.current = which
        return await self._shown(chat, model)

    async def on_axis(self, chat: Chat, axis: int, model: str | None):
        if (scan := _current(chat)) is not None and axis in range(len(AXES)):
            scan.choose_axis(axis)
            scan.is_wanted = True
        return await self._shown(chat, model)

    async def on_preset(self, chat: Chat, preset: str, centre: float, width: float, model: str | None):
        if (scan := _current(chat)) is not None:
            scan.window = {OF_THE_FILE: None, OWN: (centre, width)}.get(preset, preset)
            scan.is_wanted = True
        return await self._shown(chat, model)

    async def on_window(self, chat: Chat, centre: float, width: float, model: str | None):
        if (scan := _current(chat)) is not None and None not in (centre, width):
            scan.window = (float(centre), float(width))
            scan.is_wanted = True
        return [OWN, *await self._seen(chat, model)]

    async def on_place(self, chat: Chat, place: float, model: str | None):
        if (scan := _current(chat)) is not None and place is not None:
            if not 0 <= place < len(scan.slices):
                raise _error(f"There is no slice {place:g}; the scan has {len(scan.slices)}.")
            scan.place, scan.is_wanted = int(place), True
        return await self._seen(chat, model)

    async def on_add(self, chat: Chat):
        """The view is kept as an image of the question; the next one that is chosen is another."""
        if (scan := _current(chat)) is not None:
            try:
                chat.draft.append(await self._view(scan))
            except (LlavaError, ServeError) as error:
                raise _error(str(error)) from error
            scan.is_wanted = False
        return thumbnails(chat.draft), said_of(chat)

    async def on_remove(self, chat: Chat, model: str | None):
        if chat.scans:
            del chat.scans[chat.current]
            chat.current = max(0, chat.current - 1)
        return await self._shown(chat, model)

    async def _view(self, scan: Scan) -> UploadedImage:
        view = await in_thread(scan.view, self.pool, seconds=LOOK_SECONDS)
        self.budget.take(view, len(view.url) + len(view.thumbnail))
        return view

    async def _shown(self, chat: Chat, model: str | None) -> list[Any]:
        """All controls, as the current scan needs them."""
        scan = _current(chat)
        if scan is None:
            return [gr.Column(visible=False), *[gr.skip()] * (len(self.controls) - 1)]
        seen = await self._seen(chat, model)
        names = [(f"{number}: {each.title}", number - 1) for number, each in enumerate(chat.scans, 1)]
        preset = scan.window if isinstance(scan.window, str) else OF_THE_FILE if scan.window is None else OWN
        (low, high, centre), (least, most, width), step = _slider_ranges(scan)
        count, grey = len(scan.slices), scan.is_grey
        label = "Frame" if scan.title.endswith("frames") else "Slice"
        return [
            gr.Column(visible=True),
            gr.Dropdown(names, value=chat.current, visible=len(names) > 1),
            gr.Slider(0, max(1, count - 1), scan.place, label=f"{label} (of {count})", visible=count > 1),
            gr.Radio(value=scan.axis, visible=scan.kind == "nifti"),
            gr.Dropdown(value=preset, visible=grey),
            gr.Slider(low, high, centre, step=step, visible=grey),
            gr.Slider(least, most, width, step=step, visible=grey),
            *seen,
        ]

    async def _seen(self, chat: Chat, model: str | None) -> list[Any]:
        """The preview, and what is said of it."""
        scan = _current(chat)
        if scan is None:
            return ["", ""]
        try:
            opened: Image.Image = await in_thread(scan.look, self.pool, seconds=LOOK_SECONDS)
            images, words = await self._as_model_sees(scan, opened, model)
        except (LlavaError, ServeError) as error:
            return [f'<p class="scan-fault">{html.escape(str(error))}</p>', said_of(chat)]
        shown = "; ".join(str(line) for line in scan.facts.get("shown", ()))
        pictures = "".join(f'<img class="scan" alt="{html.escape(words)}" src="{url}">' for url in images)
        return [f"{pictures}<p>{html.escape(words)}: {html.escape(shown)}.</p>", said_of(chat)]

    async def _as_model_sees(self, scan: Scan, opened: Image.Image, model: str | None) -> tuple[list[str], str]:
        """(images as data: URLs, whose view they are)."""
        if model:
            view = await in_thread(functools.partial(scan.view, self.pool), seconds=LOOK_SECONDS)
            message = {"role": "user", "content": [view.part(), {"type": "text", "text": "?"}]}
            try:
                return await self.client.seen_images({"model": model, "messages": [message]}), f"What {model} sees"
            except ServeError as error:
                logger.info("no preview of %s: %s", model, error)
        opened.thumbnail((SHOWN_SIZE, SHOWN_SIZE))
        return [png_data_url(opened)], "As it is opened; how the model's own size changes it isn't known"


def said_of(chat: Chat) -> str:
    """HTML: whether the current view goes with the next question."""
    scan = _current(chat)
    if scan is None:
        return ""
    return (
        "<p>This view goes with your next question.</p>"
        if scan.is_wanted
        else "<p>This view is added already. Change the slice or the window to ask about another one.</p>"
    )


def is_scan(path: str) -> bool:
    """Whether an upload is DICOM or NIfTI, by its first bytes."""
    try:
        return image_kind(path) != "image"
    except ImageError:
        return False


def take_file(path: str) -> bytes:
    """The content of an upload, which is deleted: a conversation lives in memory alone."""
    file = Path(path)
    content = file.read_bytes()
    file.unlink()
    return content


def _current(chat: Chat) -> Scan | None:
    return chat.scans[chat.current] if chat.scans else None


def _slider_ranges(scan: Scan) -> tuple[tuple[float, float, float], tuple[float, float, float], float]:
    """(least, most, value) of the sliders of centre and width, and their step, in the file's units."""
    low, high = scan.facts.get("values") or (0.0, 1.0)
    window = scan.facts.get("window") or ((low + high) / 2, max(high - low, 1e-6))
    centre, width = float(window[0]), float(window[1])
    step = 1.0 if high - low > 50 else max(high - low, width, 1e-6) / 200
    return (
        (min(low, centre), max(high, centre, low + step), centre),
        (min(step, width), max(high - low, width, 2 * step), width),
        step,
    )


def _error(words: str) -> gr.Error:
    return gr.Error(words, title="The image can't be used", print_exception=False)
