"""The web page: its parts and what they do. `build_page(client, options)` gives gradio's Blocks."""

import asyncio
import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from llava.errors import LlavaError
from llava.serve.conversation_log import notice
from llava.serve.daily_log import DailyLog
from llava.serve.decoding.pool import DecodingPool, in_thread
from llava.serve.job import MAX_IMAGES
from llava.serve.protocol import ServeError
from llava.serve.web.answers import answer
from llava.serve.web.attention_view import AttentionPart
from llava.serve.web.chat_state import SIDES, THUMBNAIL, Chat, Exchange, UploadedImage, thumbnails
from llava.serve.web.examples import EXAMPLES, draw_example
from llava.serve.web.memory_budget import MemoryBudget
from llava.serve.web.scan_view import ScanPart, is_scan, said_of, take_file
from llava.serve.web.settings import SettingsPanel

logger = logging.getLogger(__name__)

TITLE = "LLaVA-Med"
POLL_SECONDS = 3
NO_SECOND = "none"
MOST_SESSIONS = 500
"""Conversations that are kept; beyond, the one that was used least recently is forgotten."""
CALLS_NOTED = 100
"""Of which gradio tells itself how long they took."""
UPLOAD_SECONDS = 60.0
"""For the images of one question, with waiting for those of others."""
NOTICE = """## Before you begin

This is a research demonstration. **It is not a medical device.** Answers can be wrong, incomplete or invented, also
where they sound certain. Don't use them for diagnosis, treatment or any other clinical decision.

Don't upload images or texts that could identify a patient."""
WAITING = """## No model is ready yet

The page looks for one every few seconds and opens by itself. Whoever runs this server starts a model with

    python -m llava.serve.model_worker --model-path CHECKPOINT"""
LOGGED = "Votes and flags, with the conversation's text, are kept on this server for {days:g} days. Images aren't."

_ASSETS = Path(__file__).parent / "assets"
CSS, HEAD, DOWNLOAD = ((_ASSETS / name).read_text("utf-8") for name in ("page.css", "head.html", "download.js"))


def page_theme() -> gr.themes.Base:
    """Quiet colours, and the fonts that the reader's system has: nothing is fetched."""
    return gr.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


@dataclass(frozen=True)
class PageOptions:
    """`reload_models` asks the workers anew whenever the page is opened; `embed` leaves out the heading."""

    reload_models: bool = True
    embed: bool = False
    first_model: str | None = None
    """Which one is chosen at first."""
    concurrency: int = 16
    feedback: DailyLog | None = None
    """Where votes are kept; None shows no buttons for them."""
    image_bytes: int = 1 << 30
    """Of the images in all conversations together."""


def build_page(client, options: PageOptions) -> gr.Blocks:
    """The page over a `ServingClient`."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(300, 600), fill_width=True) as page:
        Page(client, options)
    page.queue(default_concurrency_limit=options.concurrency)
    # `launch` would take it; this page is mounted.
    page.state_session_capacity = MOST_SESSIONS
    # gradio holds messages for 2,000 visitors and notes on 10,000 calls, 4 KB more with each visitor.
    page._queue.pending_messages_per_session.max_size = MOST_SESSIONS
    page._queue.ANALYTICS_MAX_EVENTS = CALLS_NOTED
    return page


class Page:
    """Components as attributes, handlers as methods. What belongs to one visitor is in `chat` and `known`."""

    def __init__(self, client, options: PageOptions):
        self.client, self.options = client, options
        self.pool = DecodingPool()
        self.image_budget = MemoryBudget(options.image_bytes)
        self._lay_out()
        self._connect()

    def _lay_out(self) -> None:
        feedback = self.options.feedback
        self.chat = gr.State(Chat(), time_to_live=3600)
        self.known = gr.State([], time_to_live=3600)
        self.accepted = gr.State(False)
        self.timer = gr.Timer(POLL_SECONDS)
        if not self.options.embed:
            gr.Markdown(f"# {TITLE}\nAsk about medical images. *For research only, never for clinical use.*")
        if feedback is not None:
            gr.Markdown(f"**{LOGGED.format(days=feedback.keep_days)}**", elem_id="logged")
        kept = f"**{notice(self.client.log.keep_days)}**" if self.client.log else None
        with gr.Column(elem_id="notice") as self.notice:
            gr.Markdown(f"{NOTICE}\n\n{kept}" if kept else NOTICE)
            self.accept = gr.Button("I understand and accept", variant="primary", elem_id="accept")
        with gr.Column(visible=False, elem_id="waiting") as self.waiting:
            gr.Markdown(WAITING)
        with gr.Column(visible=False, elem_id="main") as self.main:
            if kept:
                gr.Markdown(kept, elem_id="kept")
            with gr.Row():
                self.model = gr.Dropdown([], label="Model", elem_id="model")
                self.other = gr.Dropdown([NO_SECOND], value=NO_SECOND, label="Compare with", elem_id="other")
            with gr.Row(elem_id="desk"):
                self.scan = ScanPart(self.client, self.pool, self.image_budget)
                with gr.Column(scale=2, min_width=300), gr.Row():
                    self.views = [
                        gr.Chatbot(
                            label=("Answers", "Answers of the second model")[side],
                            visible=side == 0,
                            min_height=150,
                            max_height=560,
                            allow_tags=False,
                            buttons=["copy"],
                            feedback_options=None,
                            min_width=300,
                            placeholder="Add one or more images and ask.",
                            elem_id=f"chat{side}",
                        )
                        for side in range(SIDES)
                    ]
            self.draft = gr.HTML(elem_id="draft")
            self.box = gr.MultimodalTextbox(
                file_count="multiple",
                sources=["upload"],
                placeholder="Ask about the images; drop files here",
                label="Question",
                show_label=False,
                elem_id="box",
                autofocus=True,
            )
            with gr.Row(elem_id="actions"):
                self.stop = gr.Button("Stop", variant="stop", size="sm", elem_id="stop", interactive=False)
                self.again = gr.Button("Regenerate", size="sm", elem_id="again")
                self.edit = gr.Button("Edit question", size="sm", elem_id="edit")
                self.clear = gr.Button("Clear", size="sm", elem_id="clear")
                self.export = gr.Button("Export", size="sm", elem_id="export")
            with gr.Row(elem_id="votes", visible=feedback is not None):
                self.votes = {
                    vote: gr.Button(words, size="sm", elem_id=f"vote-{vote}")
                    for vote, words in {
                        "good": "Good answer",
                        "bad": "Bad answer",
                        "left": "First is better",
                        "right": "Second is better",
                        "tie": "Equal",
                        "flag": "Flag",
                    }.items()
                }
            with gr.Accordion("Examples", open=True):
                self.examples = [
                    (
                        gr.Button(f"{name.capitalize()}: {question}", size="sm", elem_id=f"example-{name}"),
                        name,
                        question,
                    )
                    for name, question in EXAMPLES
                ]
            self.attention = AttentionPart(self.client)
            self.settings = SettingsPanel()
            self.exported = gr.Textbox(visible="hidden", elem_id="exported")

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        view = [self.chat, *self.views, self.box, self.draft, self.stop, self.scan.part, self.scan.state]
        chosen = [self.model, self.other, *self.settings.controls]
        places = [self.known, self.waiting, self.main, self.model, self.other]
        self.accept.click(self.on_accept, self.known, [self.notice, self.waiting, self.main, self.accepted], **quiet)
        self.timer.tick(self.on_tick, [self.known, self.accepted, self.model, self.other], places, **quiet)
        self.other.change(self.on_other, [self.other, self.chat], [self.views[1], self.attention.side], **quiet)
        # "multiple": otherwise gradio drops, without a word, what is asked while an answer is being made.
        asking = {**quiet, "trigger_mode": "multiple"}
        self.box.submit(self.on_ask, [self.chat, self.box, *chosen], view, **asking)
        self.again.click(self.on_again, [self.chat, self.box, *chosen], view, **asking)
        self.stop.click(self.on_stop, self.chat, self.chat, queue=False, **quiet)
        self.edit.click(self.on_edit, self.chat, view, **quiet)
        self.clear.click(self.on_clear, self.chat, view, **quiet)
        for each in self.views:
            # The component's own bin empties only what is seen.
            each.clear(self.on_clear, self.chat, view, **quiet)
        self.export.click(self.on_export, self.chat, self.exported, **quiet).success(
            None, self.exported, None, js=DOWNLOAD, **quiet
        )
        for button, name, question in self.examples:
            button.click(self._example(name, question), self.chat, [self.chat, self.box, self.draft], **quiet)
        self.attention.connect(self.chat, quiet)
        self.scan.connect(self.chat, self.box, self.draft, self.model, quiet)
        if self.options.feedback is not None:
            for vote, button in self.votes.items():
                button.click(self._vote(vote, self.options.feedback), self.chat, None, **quiet)

    async def on_accept(self, known: list[str]):
        return gr.Column(visible=False), gr.Column(visible=not known), gr.Column(visible=bool(known)), True

    async def on_tick(self, known: list[str], accepted: bool, model: str | None, other: str):
        """Look which models there are; nothing on the page moves unless that has changed."""
        if known and not self.options.reload_models:
            return [gr.skip()] * 5
        try:
            models = await self.client.models()
        except ServeError as error:
            logger.info("no models: %s", error)
            models = []
        if models == known:
            return [gr.skip()] * 5
        # While an answer is being made or read, a worker that has gone only leaves the list.
        keeps_open = bool(known or models)
        preferred = [model, self.options.first_model, *models]
        return (
            models,
            gr.Column(visible=accepted and not keeps_open),
            gr.Column(visible=accepted and keeps_open),
            gr.Dropdown(choices=models, value=next((one for one in preferred if one in models), None)),
            gr.Dropdown(choices=[NO_SECOND, *models], value=other if other in models else NO_SECOND),
        )

    async def on_other(self, other: str, chat: Chat):
        has_second = other != NO_SECOND
        return gr.Chatbot(value=chat.shown(1), visible=has_second), gr.Radio(visible=has_second, value=0)

    async def on_ask(self, chat: Chat, box: dict, *chosen):
        if await _is_busy(chat):
            yield [gr.skip()] * 8
            return
        text = (box["text"] or "").strip()
        try:
            others = await self._take_files(chat, box["files"] or [])
            images = [*chat.draft, *await self.scan.views(chat), *others]
        except (LlavaError, ServeError) as error:
            raise _error(str(error), "The image can't be used") from error
        already = sum(len(exchange.images) for exchange in chat.exchanges)
        if already + len(images) > MAX_IMAGES:
            raise _error(f"A conversation holds at most {MAX_IMAGES} images. Clear it first.", "Too many images")
        if not text:
            chat.draft += others
            gr.Warning("Write a question too.")
            yield self._show(chat, box={"text": "", "files": []})
            return
        if not chosen[0]:
            raise _error("No model is ready. The list of models shows when there is one.", "Not now")
        chat.draft = []
        for scan in chat.scans:
            scan.is_wanted = False
        chat.exchanges.append(Exchange(text, tuple(images)))
        async for update in self._answer(chat, *chosen):
            yield update

    async def on_again(self, chat: Chat, box: dict, *chosen):
        if await _is_busy(chat):
            yield [gr.skip()] * 8
            return
        if not chat.exchanges or not chosen[0]:
            gr.Info("There is no question yet.")
            yield self._show(chat)
            return
        async for update in self._answer(chat, *chosen):
            yield update

    async def _answer(self, chat: Chat, model, other, *settings):
        models = [model, None if other == NO_SECOND else other]
        try:
            sampling = self.settings.read(settings)
        except LlavaError as error:
            raise _error(str(error), "Settings") from error
        # The box is emptied once: the next question may be typed while this one is answered.
        box: dict[str, Any] | None = {"text": "", "files": []}
        chat.running = True
        try:
            async for _ in answer(self.client, chat, models, sampling):
                yield self._show(chat, box, running=True)
                box = None
        finally:
            chat.running = False
        yield self._show(chat)

    async def on_stop(self, chat: Chat):
        chat.stopping = True
        return chat

    async def on_edit(self, chat: Chat):
        """The last question goes back into the box, with its images."""
        if not chat.exchanges:
            gr.Info("There is no question yet.")
            return self._show(chat)
        chat.stopping = True
        last = chat.exchanges.pop()
        chat.draft = list(last.images)
        return self._show(chat, box={"text": last.text, "files": []})

    async def on_clear(self, chat: Chat):
        chat.stopping = True
        return self._show(Chat(), box={"text": "", "files": []})

    async def on_export(self, chat: Chat):
        if not chat.exchanges:
            raise _error("There is nothing to export yet.", "Export")
        return json.dumps(chat.record(), indent=1)

    async def _take_files(self, chat: Chat, files: list[str]) -> list[UploadedImage]:
        """The images among the uploaded files; scans, of which a view is chosen, go into the chat."""
        new = [file for file in files if file not in chat.taken]
        scans = [file for file in new if is_scan(file)]
        others = [file for file in new if file not in scans]
        chat.taken.update(others)
        await self.scan.take(chat, scans)
        while chat.reading:
            await asyncio.sleep(0.02)
        return await in_thread(self._read_images, others, seconds=UPLOAD_SECONDS)

    def _read_images(self, files: list[str]) -> list[UploadedImage]:
        contents = [take_file(file) for file in files]
        small = functools.partial(self.pool.open, longest=THUMBNAIL)
        images = [UploadedImage.from_bytes(content, small) for content in contents]
        for image in images:
            self.image_budget.take(image, len(image.url) + len(image.thumbnail))
        return images

    def _example(self, name: str, question: str):
        async def on_example(chat: Chat):
            chat.draft = [UploadedImage.from_bytes(draw_example(name))]
            return chat, {"text": question, "files": []}, thumbnails(chat.draft)

        return on_example

    def _vote(self, vote: str, feedback: DailyLog):
        async def on_vote(chat: Chat):
            if not chat.exchanges:
                gr.Info("There is no answer yet.")
                return
            if await asyncio.to_thread(feedback.write, {"vote": vote, **chat.record()}):
                gr.Info("Thank you, kept.")
            else:
                gr.Warning("The server can't keep this just now.")

        return on_vote

    def _show(self, chat: Chat, box: dict | None = None, running: bool = False):
        """Values of all that changes with a conversation, in the order of `view`."""
        return (
            chat,
            chat.shown(0),
            chat.shown(1),
            gr.skip() if box is None else box,
            thumbnails(chat.draft),
            gr.Button(interactive=running),
            gr.skip() if chat.scans else gr.Column(visible=False),
            said_of(chat),
        )


async def _is_busy(chat: Chat) -> bool:
    """Whether an answer is still being made; one that was told to stop is waited for."""
    while chat.running and chat.stopping:
        await asyncio.sleep(0.02)
    if chat.running:
        gr.Info("The last question is still being answered. Wait for its end, or stop it.")
    return chat.running


def _error(words: str, title: str) -> gr.Error:
    return gr.Error(words, title=title, print_exception=False)
