"""Which workers there are and which of them gets the next request. No network here: the controller asks and tells."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.errors import LlavaError
from llava.serve.protocol import check_address
from llava.serve.request_models import WorkerStatus

DISPATCH_METHODS = ("lottery", "shortest_queue")


@dataclass
class Worker:
    """A worker as it last described itself; `seen` is when (monotonic seconds)."""

    address: str
    model_names: tuple[str, ...]
    speed: float = 1.0
    queue_length: int = 0
    check_heart_beat: bool = True
    seen: float = 0.0
    card: dict[str, str | None] | None = None
    """What it says of its model (`llava.serve.request_models.ModelCard`)."""


@dataclass
class Registry:
    """The table of workers.

    A dead worker leaves after CONTROLLER_HEART_BEAT_EXPIRATION without a heartbeat. With `one_owner_per_model` (for
    controllers without a secret) a model's name belongs to the machine that registered it first, as long as that lives.
    """

    dispatch_method: str = "shortest_queue"
    clock: Callable[[], float] = time.monotonic
    dice: random.Random = field(default_factory=random.Random)
    workers: dict[str, Worker] = field(default_factory=dict)
    one_owner_per_model: bool = False

    def __post_init__(self) -> None:
        self.began = self.clock()

    def register(self, address: str, status: WorkerStatus, check_heart_beat: bool = True) -> Worker:
        """Add or update a worker from its status; an address that isn't one is a LlavaError."""
        worker = to_worker(address, status, check_heart_beat, self.clock())
        if self.one_owner_per_model:
            self._check_owner(worker)
        self.workers[worker.address] = worker
        return worker

    def _check_owner(self, worker: Worker) -> None:
        self.expire()
        for other in self.workers.values():
            taken = set(worker.model_names) & set(other.model_names)
            if taken and urlsplit(other.address).hostname != urlsplit(worker.address).hostname:
                raise LlavaError(f"worker {worker.address}: the name {min(taken)!r} belongs to another machine")

    def heartbeat(self, address: str, queue_length: int) -> bool:
        """Note a sign of life; False asks the worker to register (again)."""
        worker = self.workers.get(address)
        if worker is None:
            return False
        worker.queue_length, worker.seen = queue_length, self.clock()
        return True

    def remove(self, address: str) -> None:
        self.workers.pop(address, None)

    def expire(self) -> list[str]:
        """Drop and return the workers whose heartbeat is overdue."""
        limit = self.clock() - CONTROLLER_HEART_BEAT_EXPIRATION
        overdue = [
            worker.address for worker in self.workers.values() if worker.check_heart_beat and worker.seen < limit
        ]
        for address in overdue:
            del self.workers[address]
        return overdue

    def replace(self, before: Worker, now: Worker | None) -> None:
        """Note what a worker that was asked has said (None: nothing), unless it left or registered anew meanwhile."""
        if self.workers.get(before.address) is not before:
            return
        if now is None:
            self.remove(before.address)
        else:
            self.workers[before.address] = now

    def is_new(self) -> bool:
        """Whether a living worker may not be back yet: workers look for their controller at each heartbeat."""
        return self.clock() < self.began + CONTROLLER_HEART_BEAT_EXPIRATION

    def models(self) -> list[str]:
        self.expire()
        return sorted({name for worker in self.workers.values() for name in worker.model_names})

    def choose(self, model: str, exclude: frozenset[str] = frozenset()) -> str | None:
        """The address of the worker that gets the next request for `model`; None if there is none."""
        self.expire()
        able = [w for w in self.workers.values() if model in w.model_names and w.address not in exclude]
        if not able:
            return None
        if self.dispatch_method == "lottery":
            speeds = [max(worker.speed, 0.0) for worker in able]
            return self.dice.choices(able, speeds if sum(speeds) > 0 else None)[0].address
        chosen = min(able, key=lambda worker: (worker.queue_length + 1) / max(worker.speed, 1e-9))
        chosen.queue_length += 1  # corrected by its next heartbeat
        return chosen.address

    def status(self) -> dict:
        """All workers as if they were one."""
        models = self.models()  # first, as it drops the workers that are overdue
        workers = self.workers.values()
        return {
            "model_names": models,
            "speed": sum(worker.speed for worker in workers),
            "queue_length": sum(worker.queue_length for worker in workers),
        }


def to_worker(address: str, status: WorkerStatus, check_heart_beat: bool, now: float) -> Worker:
    """A Worker from what it says of itself; an address that isn't one is a LlavaError."""
    names = tuple(status.model_names)
    card = None if status.card is None else status.card.model_dump()
    return Worker(check_address(address), names, status.speed, status.queue_length, check_heart_beat, now, card)


def refreshed(worker: Worker, status: WorkerStatus, now: float) -> Worker:
    """`worker` with a fresh status."""
    return to_worker(worker.address, status, worker.check_heart_beat, now)
