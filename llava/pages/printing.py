"""A page as a PDF, by the browser that is installed."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from llava.errors import LlavaError
from llava.records import atomic_path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
_PATIENCE = 120


def printing_browser() -> str:
    """The program that prints.

    Raises:
        LlavaError: there is none.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise LlavaError(f"--pdf needs a browser to print with: none of {', '.join(BROWSERS)} is installed")
    return found


def print_page(page: str | Path, browser: str) -> Path:
    """Write the PDF of `page` beside it and return its path, relative where that of `page` is.

    Raises:
        LlavaError: the browser printed nothing.
    """
    pdf = Path(page).with_suffix(".pdf")
    with atomic_path(pdf) as part, tempfile.TemporaryDirectory() as profile:
        words = [browser, "--headless", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={profile}"]
        # Its sandbox refuses to run as the superuser, in containers say.
        words += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        words += [f"--print-to-pdf={Path(part).resolve()}", Path(page).resolve().as_uri()]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LlavaError(f"{browser}: {error}") from error
        if done.returncode or not Path(part).is_file() or not Path(part).stat().st_size:
            said = done.stderr.strip().splitlines() or ["it printed nothing"]
            raise LlavaError(f"{pdf}: {browser} ended with {done.returncode}: {said[-1]}")
    return pdf
