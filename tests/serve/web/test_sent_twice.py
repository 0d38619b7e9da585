"""A question that is sent twice at once, or taken back at once, while the page still draws the images beside it."""

import asyncio

import gradio as gr

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
