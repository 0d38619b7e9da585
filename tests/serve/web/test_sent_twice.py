"""A question that is sent twice at once, or taken back at once, while the page still draws the images beside it."""

import asyncio

import gradio as gr
import pytest

from llava.serve.decoding.pool import DecodingPool
from llava.serve.web.chat_state import Chat, Exchange, UploadedImage
from llava.serve.web.memory_budget import DrawnViews, MemoryBudget
from llava.serve.web.page import NO_SECOND, Page, PageOptions
from llava.serve.web.parts.examples import draw_example


class Client:
    """Workers that need a moment to say what a model sees."""

    log = None

    def __init__(self):
        self.asked = 0

    async def seen_images(self, body):
        await asyncio.sleep(0.05)
        return []

    async def generate(self, body):
        self.asked += 1
        yield {"text": "Yes.", "token_ids": [1]}


def prepared():
    client = Client()
    with gr.Blocks():
        page = Page(client, PageOptions(), DrawnViews(DecodingPool(), MemoryBudget(1 << 30)))
    image = UploadedImage.from_bytes(draw_example("tissue"))
    chosen = ["m", NO_SECOND, *(control.value for control in page.settings.controls)]
    return client, page, Chat([Exchange("Is it?", (image,))], is_compared=True), chosen


async def whole(updates):
    return [update async for update in updates]


def test_a_second_click_makes_no_second_answer():
    client, page, chat, chosen = prepared()
    box = {"text": "", "files": []}

    async def twice():
        await asyncio.gather(*(whole(page.on_again(chat, box, *chosen)) for _ in range(2)))

    asyncio.run(twice())
    assert client.asked == 1 and chat.exchanges[0].replies[0].text == "Yes." and not chat.running


def test_a_question_that_is_taken_back_at_once_is_not_answered():
    client, page, chat, chosen = prepared()
    box = {"text": "", "files": []}

    async def taken_back():
        answering = asyncio.create_task(whole(page.on_again(chat, box, *chosen)))
        await asyncio.sleep(0.01)
        await page.on_edit(chat, box, "m")
        await answering

    asyncio.run(taken_back())
    assert client.asked == 0 and not chat.exchanges and not chat.running


def test_a_conversation_that_is_cleared_while_it_is_answered_stays_so():
    client, page, chat, chosen = prepared()
    shown = []

    async def growing(body):
        for number in range(1, 200):
            await asyncio.sleep(0.01)
            yield {"text": "Yes. " * number, "token_ids": [1]}

    client.generate = growing

    async def answered():
        async for update in page.on_again(chat, {"text": "", "files": []}, *chosen):
            shown.append(update[0])

    async def cleared():
        answering = asyncio.create_task(answered())
        while not shown:
            await asyncio.sleep(0.01)
        new = (await page.on_clear(chat, "m"))[0]
        before = len(shown)
        await answering
        return new, before

    new, before = asyncio.run(cleared())
    assert not new.exchanges and shown[0] is chat and not chat.running
    assert all(one is not chat for one in shown[before:])


@pytest.mark.parametrize("text", ["Is it?", ""], ids=["a question", "no question"])
def test_a_conversation_that_is_cleared_while_its_files_are_read_stays_so(text):
    client, page, chat, chosen = prepared()
    chat.reading = 1

    async def cleared():
        asking = asyncio.create_task(whole(page.on_ask(chat, {"text": text, "files": []}, None, *chosen)))
        adding = asyncio.create_task(page.incoming.on_files(chat, {"text": text, "files": []}, "m", None))
        await page.on_clear(chat, "m")
        chat.reading = 0
        return [*await asking, await adding]

    asked, added = asyncio.run(cleared())
    assert all(value == gr.skip() for value in asked) and all(value == gr.skip() for value in added[1:])
    assert client.asked == 0 and len(chat.exchanges) == 1


def test_a_worker_may_leave_out_what_it_said_in_tokens():
    client, page, chat, chosen = prepared()

    async def bare(body):
        yield {"text": "Yes.", "token_ids": None}

    client.generate = bare
    asyncio.run(whole(page.on_again(chat, {"text": "", "files": []}, *chosen)))
    reply = chat.exchanges[0].replies[0]
    assert (reply.text, reply.error, reply.token_ids) == ("Yes.", "", [])
