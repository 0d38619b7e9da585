"""LLaVA's `llava.utils`, for tools written for LLaVA."""

import logging
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path

from llava.constants import LOGDIR


def disable_torch_init() -> None:
    """Nothing: models are built without initialising weights that are read from files."""


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """A logger of that name that writes to the terminal and, a file a day, to `logger_filename` in LOGDIR."""
    logger = logging.getLogger(logger_name)
    if not logger.handlers:
        form = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S")
        file = TimedRotatingFileHandler(
            Path(LOGDIR) / logger_filename, when="D", utc=True, encoding="utf-8", delay=True
        )
        for handler in (logging.StreamHandler(), file):
            handler.setFormatter(form)
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return logger
