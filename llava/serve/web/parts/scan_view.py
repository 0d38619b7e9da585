"""The page's part for DICOM and NIfTI files: which slice and which grey window go with the question."""

from typing import Any

import gradio as gr

from llava.constants import NO_IMAGE
from llava.errors import ImageError, LlavaError, amount
from llava.image_options import AXES, CT_WINDOWS
from llava.images.headers.kinds import image_kind
from llava.serve.decoding.pool import in_thread
from llava.serve.protocol import ServeError
from llava.serve.web.chat_state import Chat, UploadedImage, thumbnails
from llava.serve.web.parts.viewer import Viewer, current_scan
from llava.serve.web.scans import Scan, read_scans, size_of

OF_THE_FILE, OWN = "automatic", "own values"
READ_SECONDS = 120.0
"""For the files of one upload, with waiting for those of others."""


class ScanPart:
    """Its components and handlers; the scans of a visitor are in his chat."""

    def __init__(self, viewer: Viewer):
        self.viewer, self.pool, self.budget = viewer, viewer.drawn.pool, viewer.drawn.budget
        with gr.Column(visible=False, elem_id="scan") as self.part:
            self.place = gr.Slider(0, 1, 0, step=1, label="Slice", elem_id="scan-place")
            self.axis = gr.Radio(
                [(name, number) for number, name in enumerate(AXES)], value=2, label="Plane", elem_id="scan-axis"
            )
            with gr.Row(elem_id="scan-window"):
                self.preset = gr.Dropdown(
                    [OF_THE_FILE, *CT_WINDOWS, OWN], value=OF_THE_FILE, label="Window", elem_id="scan-preset"
                )
                self.centre = gr.Slider(0, 1, 0, label="Window centre", elem_id="scan-centre")
                self.width = gr.Slider(0, 1, 1, label="Window width", elem_id="scan-width")
            self.add = gr.Button("Keep this view, add another", size="sm", elem_id="scan-add")

    @property
    def controls(self) -> list[Any]:
        """With the viewer: what changes with the scan that is shown."""
        return [self.part, self.place, self.axis, self.preset, self.centre, self.width, self.viewer.view]

    def connect(self, chat: gr.State, draft: gr.HTML, model: gr.Dropdown, quiet: dict[str, Any]) -> None:
        seen = [self.viewer.view, draft]
        everything = [*self.controls, draft]
        self.axis.input(self.on_axis, [chat, self.axis, model], everything, **quiet)
        self.preset.input(self.on_preset, [chat, self.preset, self.centre, self.width, model], everything, **quiet)
        # Of a slider that is drawn along only the last value matters. A call of gradio takes the browser some 30 ms, so
        # slices that are only passed are asked for by their address alone (assets/viewer.js).
        drawn = {**quiet, "trigger_mode": "always_last", "queue": False}
        self.place.release(self.on_place, [chat, self.place, model], seen, **drawn)
        for slider in (self.centre, self.width):
            slider.input(self.on_window, [chat, self.centre, self.width, model], [self.preset, *seen], **drawn)
        self.add.click(self.on_add, chat, draft, **quiet)

    async def take(self, chat: Chat, files: list[tuple[str, bytes]], visitor: str) -> list[str]:
        """Read a visitor's uploads that are scans (name, content) into the chat; a line on each that is left out.

        Raises:
            LlavaError, ServeError: none can be read.
        """
        if not files:
            return []
        scans, refused = await in_thread(read_scans, files, self.pool, seconds=READ_SECONDS)
        taken = []
        for scan in scans:
            try:
                self.budget.take(scan, size_of(scan))
            except LlavaError as error:
                refused.append(str(error))
                continue
            self.viewer.drawn.add(scan, visitor)
            taken.append(scan)
        if taken:
            chat.current, chat.looked = len(chat.scans), None
            chat.scans += taken
        return refused

    async def views(self, chat: Chat) -> list[UploadedImage]:
        """The chosen views, which a question is asked about.

        Raises:
            LlavaError, ServeError: one can't be opened.
        """
        wanted = [scan for scan in chat.scans if scan.is_wanted]
        return [await self._view(scan) for scan in wanted]

    async def on_axis(self, chat: Chat, axis: int, model: str | None):
        if (scan := current_scan(chat)) is not None and axis in range(len(AXES)):
            scan.choose_axis(axis)
            scan.is_wanted = True
        return [*await self.shown(chat, model), draft_of(chat)]

    async def on_preset(self, chat: Chat, preset: str, centre: float, width: float, model: str | None):
        if (scan := current_scan(chat)) is not None:
            scan.window = {OF_THE_FILE: None, OWN: (centre, width)}.get(preset, preset)
            scan.is_wanted = True
        return [*await self.shown(chat, model), draft_of(chat)]

    async def on_window(self, chat: Chat, centre: float, width: float, model: str | None):
        before = draft_of(chat)
        if (scan := current_scan(chat)) is not None and None not in (centre, width):
            scan.window = (float(centre), float(width))
            scan.is_wanted = True
        return [OWN, await self.seen(chat, model), _changed(draft_of(chat), before)]

    async def on_place(self, chat: Chat, place: float, model: str | None):
        before = draft_of(chat)
        if (scan := current_scan(chat)) is not None and place is not None:
            try:
                scan.choose_place(int(place))
            except ImageError as error:
                raise _error(str(error)) from error
            scan.is_wanted = True
        return [await self.seen(chat, model), _changed(draft_of(chat), before)]

    async def on_add(self, chat: Chat):
        """The view is kept as an image of the question; the next one that is chosen is another."""
        if (scan := current_scan(chat)) is not None:
            try:
                chat.draft.append(await self._view(scan))
            except (LlavaError, ServeError) as error:
                raise _error(str(error)) from error
            scan.is_wanted = False
        return draft_of(chat)

    async def _view(self, scan: Scan) -> UploadedImage:
        view = await self.viewer.drawn.image(scan)
        self.budget.take(view, view.size)
        return view

    async def shown(self, chat: Chat, model: str | None) -> list[Any]:
        """Values of `controls`: what the image that is shown large needs."""
        seen = await self.seen(chat, model)
        scan = current_scan(chat)
        if scan is None:
            return [gr.Column(visible=False), *[gr.skip()] * (len(self.controls) - 2), seen]
        preset = scan.window if isinstance(scan.window, str) else OF_THE_FILE if scan.window is None else OWN
        (low, high, centre), (least, most, width), step = _slider_ranges(scan)
        count, grey = len(scan.slices), scan.is_grey
        label = "Frame" if scan.title.endswith("frames") else "Slice"
        return [
            gr.Column(visible=True),
            gr.Slider(0, max(1, count - 1), scan.place, label=f"{label} (of {count})", visible=count > 1),
            gr.Radio(value=scan.axis, visible=scan.kind == "nifti"),
            gr.Dropdown(value=preset, visible=grey),
            gr.Slider(low, high, centre, step=step, visible=grey),
            gr.Slider(least, most, width, step=step, visible=grey),
            seen,
        ]

    async def seen(self, chat: Chat, model: str | None) -> str:
        """What the viewer shows: words if the view can't be opened."""
        try:
            return await self.viewer.html(chat, model)
        except (LlavaError, ServeError) as error:
            return self.viewer.fault(chat, f"The view can't be shown: {error}")


def draft_of(chat: Chat) -> str:
    """HTML: what goes with the next question."""
    count = len(chat.draft) + sum(scan.is_wanted for scan in chat.scans)
    words = f"With your next question: {amount(count, 'image')}." if count else ""
    if not count and not chat.images():
        words = NO_IMAGE
    elif not count and chat.scans:
        words = "The view is added already. Change the slice or the window to ask about another one."
    if not words:
        return ""
    scan = current_scan(chat)
    if scan is not None and scan.is_wanted:
        words += " The view that is shown is one of them." if count > 1 else " It is the view that is shown."
    return f"{thumbnails(chat.draft)}<span>{words}</span>"


def _changed(now: str, before: str) -> Any:
    """Nothing is sent of what the browser has."""
    return gr.skip() if now == before else now


def is_scan(path: str) -> bool:
    """Whether an upload is DICOM or NIfTI, by its first bytes."""
    try:
        return image_kind(path) != "image"
    except ImageError:
        return False


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
