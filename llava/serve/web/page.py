"""The web page: its parts and what they do. `build_page(client, options)` gives gradio's Blocks."""

import asyncio
import html
import logging
from dataclasses import dataclass
from typing import Any

import gradio as gr

from llava.errors import LlavaError
from llava.serve.conversation_log import notice
from llava.serve.daily_log import DailyLog
from llava.serve.job import MAX_IMAGES
from llava.serve.protocol import ServeError
from llava.serve.request_models import ModelCard
from llava.serve.web.answers import answer
from llava.serve.web.chat_state import MOST_TEXT, SIDES, TOO_LONG, Chat, Exchange, UploadedImage, text_length
from llava.serve.web.memory_budget import DrawnViews
from llava.serve.web.parts.attention_view import AttentionPart
from llava.serve.web.parts.card import card_html, knows_drawn_only
from llava.serve.web.parts.examples import EXAMPLES, draw_example, examples_html
from llava.serve.web.parts.examples import SCRIPT as EXAMPLES_SCRIPT
from llava.serve.web.parts.incoming import Incoming, all_read, refusal_of
from llava.serve.web.parts.saving import SavingPart
from llava.serve.web.parts.scan_view import ScanPart, draft_of
from llava.serve.web.parts.settings import SettingsPanel
from llava.serve.web.parts.viewer import Viewer
from llava.serve.web.parts.votes import Votes
from llava.serve.web.texts import HEADING, KEYS, NOTICE, TITLE, WAITING

logger = logging.getLogger(__name__)

POLL_SECONDS = 3
NO_SECOND = "none"
MOST_SESSIONS = 500
"""Conversations that are kept; beyond, the one that was used least recently is forgotten."""
CALLS_NOTED = 100
"""Of which gradio tells itself how long they took."""


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


def build_page(client, options: PageOptions, drawn: DrawnViews) -> gr.Blocks:
    """The page over a `ServingClient`; the budget of `drawn` is for the images in all conversations together."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        Page(client, options, drawn)
    page.queue(default_concurrency_limit=options.concurrency)
    # `launch` would take it; this page is mounted.
    page.state_session_capacity = MOST_SESSIONS
    # gradio holds notes on 10,000 calls, 4 KB more with each visitor.
    page._queue.ANALYTICS_MAX_EVENTS = CALLS_NOTED
    return page


class Page:
    """Components as attributes, handlers as methods. What belongs to one visitor is in `chat` and `known`."""

    def __init__(self, client, options: PageOptions, drawn: DrawnViews):
        self.client, self.options, self.drawn = client, options, drawn
        self.cards: dict[str, ModelCard | None] = {}
        self._lay_out()
        self._connect()

    def _lay_out(self) -> None:
        self.chat = gr.State(Chat(), time_to_live=3600)
        self.known = gr.State([], time_to_live=3600)
        self.accepted = gr.State(False)
        self.timer = gr.Timer(POLL_SECONDS)
        kept = f"**{notice(self.client.log.keep_days)}**" if self.client.log else None
        with gr.Column(elem_id="notice") as self.notice:
            gr.Markdown(f"{NOTICE}\n\n{kept}" if kept else NOTICE)
            self.accept = gr.Button("I understand and accept", variant="primary", elem_id="accept")
        with gr.Column(visible=False, elem_id="waiting") as self.waiting:
            gr.Markdown(WAITING)
        with gr.Column(visible=False, elem_id="main") as self.main:
            self._lay_out_bar(kept)
            with gr.Row(elem_id="desk"):
                with gr.Column(elem_id="reading", min_width=0):
                    with gr.Column(elem_id="panel", min_width=0):
                        self.viewer = Viewer(self.client, self.drawn)
                        self.scan = ScanPart(self.viewer)
                    self.panes, self.views, self.names = [], [], []
                    for side in range(SIDES):
                        with gr.Column(elem_id=f"pane{side}", min_width=0, visible=side == 0) as pane:
                            self.panes.append(pane)
                            self.names.append(gr.HTML("", elem_id=f"name{side}", elem_classes="name"))
                            self.views.append(self._chatbot(side))
                with gr.Column(elem_id="ask", min_width=0):
                    self._lay_out_ask()
        with gr.Column(elem_id="drawer-settings", elem_classes="drawer"):
            self._close()
            self.settings = SettingsPanel()
            gr.HTML(KEYS)
        with gr.Column(elem_id="drawer-about", elem_classes="drawer"):
            self._close()
            self.about = gr.HTML("")
        with gr.Column(elem_id="drawer-files", elem_classes="drawer"):
            self._close()
            self.saving = SavingPart()

    @staticmethod
    def _close() -> None:
        gr.Button("Close", size="sm", elem_classes="close", min_width=0)

    def _lay_out_bar(self, kept: str | None) -> None:
        with gr.Row(elem_id="bar"):
            if not self.options.embed:
                gr.HTML(HEADING, elem_id="heading")
            self.model = gr.Dropdown([], label="Model", elem_id="model", min_width=120)
            self.other = gr.Dropdown([NO_SECOND], value=NO_SECOND, label="Compare with", elem_id="other", min_width=120)
            gr.Button("About the model", size="sm", elem_id="open-about", min_width=0)
            gr.Button("Settings", size="sm", elem_id="open-settings", min_width=0)
        if kept:
            gr.Markdown(kept, elem_id="kept")
        if self.options.feedback is not None:
            gr.Markdown(Votes.notice(self.options.feedback), elem_id="logged")

    def _chatbot(self, side: int) -> gr.Chatbot:
        return gr.Chatbot(
            label=("Answers", "Answers of the second model")[side],
            show_label=False,
            allow_tags=False,
            buttons=["copy"],
            feedback_options=None,
            placeholder=" ",
            elem_id=f"chat{side}",
        )

    def _lay_out_ask(self) -> None:
        self.examples = gr.HTML("", elem_id="examples", js_on_load=EXAMPLES_SCRIPT, apply_default_css=False)
        self.incoming = Incoming(self.scan)
        self.draft = gr.HTML(draft_of(Chat()), elem_id="draft", apply_default_css=False)
        self.box = gr.MultimodalTextbox(
            file_count="multiple",
            sources=["upload"],
            placeholder="Ask about the images; drop files here",
            label="Question",
            show_label=False,
            elem_id="box",
            autofocus=True,
        )
        with gr.Row(elem_id="tools"):
            with gr.Row(elem_id="actions"):
                gr.Button("Save", size="sm", elem_id="open-files", min_width=0)
                self.again = gr.Button("Regenerate", size="sm", elem_id="again", min_width=0)
                self.edit = gr.Button("Edit", size="sm", elem_id="edit", min_width=0)
                self.attention = AttentionPart(self.client, self.viewer)
                self.clear = gr.Button("Clear", size="sm", elem_id="clear", min_width=0)
                self.stop = gr.Button("Stop", variant="stop", size="sm", elem_id="stop", interactive=False, min_width=0)
            self.votes = None if self.options.feedback is None else Votes(self.options.feedback)

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        state = [self.chat, *self.views, self.box, self.draft, self.stop, self.incoming.refused, self.examples]
        self.view = [*state, *self.scan.controls]
        chosen = [self.model, self.other, *self.settings.controls]
        named = [*self.names, self.about, self.examples, self.viewer.view]
        places = [self.known, self.waiting, self.main, self.model, self.other]
        self.accept.click(
            self.on_accept, [self.known, self.model, self.other], [self.notice, self.accepted, *places], **quiet
        )
        self.timer.tick(self.on_tick, [self.known, self.accepted, self.model, self.other], places, **quiet)
        second = self.other.change(self.on_other, [self.other, self.chat], [self.views[1], self.panes[1]], **quiet)
        for changed in (self.model.change, second.then):
            changed(self.on_models, [self.chat, self.model, self.other], named, **quiet)
        # "multiple": otherwise gradio drops, without a word, what is asked while an answer is being made.
        asking = {**quiet, "trigger_mode": "multiple"}
        self.box.submit(self.on_ask, [self.chat, self.box, *chosen], self.view, **asking)
        self.again.click(self.on_again, [self.chat, self.box, *chosen], self.view, **asking)
        self.stop.click(self.on_stop, self.chat, self.chat, queue=False, **quiet)
        self.edit.click(self.on_edit, [self.chat, self.box, self.model], self.view, **quiet)
        self.clear.click(self.on_clear, [self.chat, self.model], self.view, **quiet)
        for chatbot in self.views:
            # The component's own bin empties only what is seen.
            chatbot.clear(self.on_clear, [self.chat, self.model], self.view, **quiet)
        self.examples.select(self.on_example, [self.chat, self.box, self.model], self.view, **quiet)
        self.viewer.view.select(self.on_look, [self.chat, self.model], [self.draft, *self.scan.controls], **quiet)
        self.settings.speed.input(self.on_speed, [self.chat, self.settings.speed], self.views, **quiet)
        self.incoming.connect(self.chat, self.box, self.draft, self.model, self.views, quiet)
        self.scan.connect(self.chat, self.draft, self.model, quiet)
        self.attention.connect(self.chat, quiet)
        self.saving.connect(self.chat, quiet)
        if self.votes is not None:
            self.votes.connect(self.chat, quiet)

    async def on_accept(self, known: list[str], model: str | None, other: str):
        """Looks for models at once, or a visitor would read until the next tick that there is none."""
        places = await self._look(known, model, other, accepted=True)
        unchanged = [gr.skip(), gr.Column(visible=not known), gr.Column(visible=bool(known)), gr.skip(), gr.skip()]
        return [gr.Column(visible=False), True, *(places or unchanged)]

    async def on_tick(self, known: list[str], accepted: bool, model: str | None, other: str):
        return await self._look(known, model, other, accepted) or [gr.skip()] * 5

    async def _look(self, known: list[str], model: str | None, other: str, accepted: bool) -> list | None:
        """Which models there are, and what the page shows of that; None if that hasn't changed: nothing moves then."""
        if known and not self.options.reload_models:
            return None
        try:
            models = await self.client.models()
        except ServeError as error:
            logger.info("no models: %s", error)
            models = []
        if models == known:
            return None
        try:
            self.cards = await self.client.cards()
        except ServeError as error:
            logger.info("no cards of models: %s", error)
        # While an answer is being made or read, a worker that has gone only leaves the list.
        keeps_open = bool(known or models)
        preferred = [model, self.options.first_model, *models]
        # A look that began before the notice was accepted may end after it: it hides nothing.
        return [
            models,
            gr.Column(visible=not keeps_open) if accepted else gr.skip(),
            gr.Column(visible=keeps_open) if accepted else gr.skip(),
            gr.Dropdown(choices=models, value=next((one for one in preferred if one in models), None)),
            gr.Dropdown(choices=[NO_SECOND, *models], value=other if other in models else NO_SECOND),
        ]

    async def on_other(self, other: str, chat: Chat):
        has_second = other != NO_SECOND
        return gr.Chatbot(value=chat.shown(1)), gr.Column(visible=has_second)

    async def on_models(self, chat: Chat, model: str | None, other: str):
        """The names over the answers, the cards, the examples, and the image as the model sees it."""
        models = [one for one in (model, other) if one and one != NO_SECOND]
        names = [f"<h2>{html.escape(one)}</h2>" for one in models]
        seen = await self.scan.seen(chat, model) if chat.is_compared else gr.skip()
        about = card_html({one: self.cards.get(one) for one in models})
        return [*names, *[""] * (SIDES - len(names)), about, self._examples(chat, model), seen]

    async def on_ask(self, chat: Chat, box: dict, request: gr.Request, *chosen):
        if await _is_busy(chat):
            yield self._unchanged()
            return
        text = (box["text"] or "").strip()
        await self.incoming.take(chat, box["files"] or [], request)
        await all_read(chat)
        await self.incoming.on_taken(chat)
        if not chat.is_cleared and (chat.refused or not text):
            gr.Warning("A file was refused: add another one, or go on without it." if text else "Write a question too.")
            yield [*self._show(chat, chosen[0], box={"text": text, "files": []}), *await self._desk(chat, chosen[0])]
            return
        if not chosen[0]:
            raise _error("No model is ready. The list of models shows when there is one.", "Not now")
        try:
            images = [*chat.draft, *await self.scan.views(chat)]
        except (LlavaError, ServeError) as error:
            raise _error(str(error), "The image can't be used") from error
        if await _is_busy(chat) or chat.is_cleared:  # a question that was sent twice, or is gone
            yield self._unchanged()
            return
        exchange = Exchange(text, tuple(images))
        if text_length([*chat.exchanges, exchange]) > MOST_TEXT:
            raise _error(TOO_LONG, "Too long")
        if sum(len(each.images) for each in [*chat.exchanges, exchange]) > MAX_IMAGES:
            raise _error(f"A conversation holds at most {MAX_IMAGES} images. Clear it first.", "Too many images")
        try:
            self.drawn.budget.take_text(exchange, len(text))
        except LlavaError as error:
            raise _error(str(error), "Not now") from error
        chat.draft = []
        for scan in chat.scans:
            scan.is_wanted = False
        chat.exchanges.append(exchange)
        async for update in self._answer(chat, *chosen):
            yield update

    async def on_again(self, chat: Chat, box: dict, *chosen):
        if await _is_busy(chat):
            yield self._unchanged()
            return
        if not chat.exchanges or not chosen[0]:
            gr.Info("There is no question yet.")
            yield self._unchanged()
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
        chat.running, chat.stopping = True, False  # before anything is waited for: a second click finds it so
        try:
            *controls, seen = await self._desk(chat, model)
            # The attention map is the last answer's.
            desk = [*controls, gr.HTML(seen, attention="")]
            if not chat.stopping and not chat.is_cleared:  # or the question was taken back meanwhile
                async for _ in answer(self.client, chat, models, sampling, self.drawn.budget):
                    if not chat.is_cleared:
                        yield [*self._show(chat, model, box, running=True), *desk]
                    box, desk = None, self._unchanged()[-len(desk) :]
        finally:
            chat.running = False
        yield self._unchanged() if chat.is_cleared else [*self._show(chat, model), *desk]

    async def on_stop(self, chat: Chat):
        chat.stopping = True
        return chat

    async def on_edit(self, chat: Chat, box: dict, model: str | None):
        """The last question goes back into the box, before what was typed and the images added meanwhile."""
        if not chat.exchanges:
            gr.Info("There is no question yet.")
            return self._unchanged()
        chat.stopping = True
        last = chat.exchanges.pop()
        chat.draft, chat.looked = [*last.images, *chat.draft], None
        text = "\n".join(filter(None, [last.text, (box["text"] or "").strip()]))
        return [*self._show(chat, model, box={"text": text, "files": []}), *await self._desk(chat, model)]

    async def on_clear(self, chat: Chat, model: str | None):
        chat.stopping = chat.is_cleared = True
        new = Chat(is_compared=chat.is_compared, shows_speed=chat.shows_speed)
        return [*self._show(new, model, box={"text": "", "files": []}), *await self._desk(new, model)]

    async def on_example(self, chat: Chat, box: dict, model: str | None, event: gr.SelectData):
        """The card's image, and its question, unless the visitor has typed one."""
        if event.index not in range(len(EXAMPLES)):
            return self._unchanged()
        name, _, question = EXAMPLES[event.index]
        chat.draft, chat.looked = [UploadedImage.from_bytes(draw_example(name))], None
        text = (box["text"] or "").strip() or question
        return [*self._show(chat, model, box={"text": text, "files": []}), *await self._desk(chat, model)]

    async def on_look(self, chat: Chat, model: str | None, event: gr.SelectData):
        """Another image of the strip, one less, or the image as the model sees it beside it."""
        chosen = event.index if isinstance(event.index, int) else -1
        count = len(chat.images())
        if event.value == "compare":
            chat.is_compared = not chat.is_compared
        elif not 0 <= chosen < count + len(chat.scans):
            return [gr.skip()] * (1 + len(self.scan.controls))
        elif event.value == "remove":
            chat.remove(chosen)
        elif chosen < count:
            chat.looked = chosen
        else:
            chat.current, chat.looked = chosen - count, None
        return [draft_of(chat), *await self._desk(chat, model)]

    async def on_speed(self, chat: Chat, shows_speed: bool):
        changes, chat.shows_speed = chat.shows_speed != bool(shows_speed), bool(shows_speed)
        return [chat.shown(side) if changes and chat.knows_speed(side) else gr.skip() for side in range(SIDES)]

    def _examples(self, chat: Chat, model: str | None) -> str:
        is_new = not chat.exchanges and not chat.draft and not chat.scans
        return examples_html() if is_new and knows_drawn_only(self.cards.get(model or "")) else ""

    def _show(self, chat: Chat, model: str | None, box: dict | None = None, running: bool = False) -> list[Any]:
        """Values of all that changes with a conversation but for the images, in the order of `view`."""
        return [
            chat,
            *(chat.shown(side) for side in range(SIDES)),
            gr.skip() if box is None else box,
            draft_of(chat),
            gr.Button(interactive=running),
            refusal_of(chat),
            self._examples(chat, model),
        ]

    async def _desk(self, chat: Chat, model: str | None) -> list[Any]:
        """Values of the images' part of `view`."""
        return await self.scan.shown(chat, model)

    def _unchanged(self) -> list[Any]:
        return [gr.skip()] * len(self.view)


async def _is_busy(chat: Chat) -> bool:
    """Whether an answer is still being made; one that was told to stop is waited for."""
    while chat.running and chat.stopping:
        await asyncio.sleep(0.02)
    if chat.running:
        gr.Info("The last question is still being answered. Wait for its end, or stop it.")
    return chat.running


def _error(words: str, title: str) -> gr.Error:
    return gr.Error(words, title=title, print_exception=False)
