"""How a worker keeps in touch with its controller: it registers, sends heartbeats, and leaves."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from llava.constants import WORKER_HEART_BEAT_INTERVAL
from llava.serve.transport.session import open_session, read_reply

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
TIMEOUT = 5.0


class Membership:
    """Keeps a worker in a controller's table, also when the controller starts later or starts anew.

    Args:
        controller: address of the controller.
        address: where this worker is reached.
        status: gives {model_names, speed, queue_length} when asked.
    """

    def __init__(self, controller: str, address: str, status: Callable[[], dict], secret: str | None):
        self.controller, self.address, self.status = controller.rstrip("/"), address, status
        self.secret = secret
        self.session: Any = None
        self.known = False
        self.complained = False
        self.task: asyncio.Task | None = None

    def start(self) -> None:
        """To be called in the event loop."""
        self.session = open_session(self.secret, TIMEOUT)
        self.task = asyncio.create_task(self._stay_known())

    async def leave(self) -> None:
        """Tell the controller to send no more requests."""
        if self.task is not None:
            self.task.cancel()
        if self.known:
            self.complained = True  # a controller that was stopped along with this worker is missed by nobody
            await self._post("/unregister_worker", {"worker_name": self.address})
        self.known = False

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()

    async def _stay_known(self) -> None:
        while True:
            try:
                self.known = await (self._beat() if self.known else self._register())
            except Exception:
                # Whatever it was: without this task the worker would be lost to its controller.
                logger.exception("controller %s can't be told; trying on", self.controller)
                self.known = False
            await asyncio.sleep(WORKER_HEART_BEAT_INTERVAL if self.known else RETRY_SECONDS)

    async def _register(self) -> bool:
        body = {"worker_name": self.address, "check_heart_beat": True, "worker_status": self.status()}
        if await self._post("/register_worker", body) is None:
            return False
        logger.info("registered with %s as %s", self.controller, self.address)
        return True

    async def _beat(self) -> bool:
        body = {"worker_name": self.address, "queue_length": int(self.status()["queue_length"])}
        reply = await self._post("/receive_heart_beat", body)
        if reply is not None and not reply.get("exist"):
            return await self._register()
        return reply is not None

    async def _post(self, path: str, body: dict) -> dict | None:
        """The reply, or None after saying once why there is none."""
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT)
            url = self.controller + path
            async with self.session.post(url, json=body, timeout=timeout, allow_redirects=False) as reply:
                content = (await read_reply(reply)).decode(errors="replace")
            if reply.status == 200:
                found = json.loads(content)
                if isinstance(found, dict):
                    self.complained = False
                    return found
            words = f"status {reply.status}: {content[:200]}"
            if reply.status == 200:
                words = f"it is no controller: {content[:200]}"
            elif reply.status == 401:
                words = "it has another secret (see --secret-file)"
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            words = f"no answer ({type(error).__name__})"
        if not self.complained:
            logger.warning("controller %s: %s; trying on", self.controller, words)
        self.complained = True
        return None
