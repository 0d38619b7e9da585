"""Votes and flags on disk: only if the server was started with a folder for them, and only for --feedback-days."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from llava.serve.web.chat_state import Chat


class FeedbackLog:
    """One JSONL file per day, readable by its owner alone; images by hash, no addresses of clients."""

    def __init__(self, folder: str | Path, keep_days: float = 30.0):
        self.folder = Path(folder).expanduser()
        self.keep_days = keep_days
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def write(self, vote: str, chat: Chat) -> None:
        """Add a vote (`good`, `bad`, `flag`, `left`, `right`, `tie`) with the conversation it is about."""
        self.drop_old()
        now = datetime.now(UTC)
        line = json.dumps({"time": now.isoformat(timespec="seconds"), "vote": vote, **json.loads(chat.export())})
        path = self.folder / f"{now:%Y-%m-%d}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def drop_old(self) -> None:
        limit = time.time() - self.keep_days * 86400
        for path in self.folder.glob("????-??-??.jsonl"):
            if path.stat().st_mtime < limit:
                path.unlink()
