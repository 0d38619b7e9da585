"""The page's buttons that say which answer is better; what they say is kept on the server."""

import asyncio
from typing import Any

import gradio as gr

from llava.serve.daily_log import DailyLog
from llava.serve.web.chat_state import Chat

LOGGED = "**Votes and flags, with the conversation's text, are kept on this server for {days:g} days. Images aren't.**"
WORDS = {
    "good": "Good answer",
    "bad": "Bad answer",
    "left": "First is better",
    "right": "Second is better",
    "tie": "Equal",
    "flag": "Flag",
}


class Votes:
    """A button for each vote."""

    def __init__(self, feedback: DailyLog):
        self.feedback = feedback
        with gr.Row(elem_id="votes"):
            self.buttons = {
                vote: gr.Button(words, size="sm", elem_id=f"vote-{vote}", min_width=0) for vote, words in WORDS.items()
            }

    @staticmethod
    def notice(feedback: DailyLog) -> str:
        """Markdown that says what is kept."""
        return LOGGED.format(days=feedback.keep_days)

    def connect(self, chat: gr.State, quiet: dict[str, Any]) -> None:
        for vote, button in self.buttons.items():
            button.click(self._handler(vote), chat, None, **quiet)

    def _handler(self, vote: str):
        async def on_vote(chat: Chat):
            if not chat.exchanges:
                gr.Info("There is no answer yet.")
                return
            mark = (vote, len(chat.exchanges), chat.exchanges[-1].asked)
            if mark in chat.votes:  # else each click would write the whole conversation
                gr.Info("Kept already.")
                return
            chat.votes.add(mark)
            if await asyncio.to_thread(self.feedback.write, {"vote": vote, **chat.record()}):
                gr.Info("Thank you, kept.")
            else:
                chat.votes.discard(mark)
                gr.Warning("The server can't keep this just now.")

        return on_vote
