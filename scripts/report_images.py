"""Photograph the first sections of the demo's report for docs/images, in Chromium.

python scripts/report_images.py runs/demo/report.html [FOLDER]
"""

import os
import shutil
import sys
from pathlib import Path

from playwright import sync_api

from llava.pages.printing import BROWSERS

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
SECTIONS = {
    "demo_scores.png": ("Scores", 490),
    "demo_curves.png": ("Loss curves", 1200),
    "demo_answers.png": ("Some answers", 550),
}
"""Title of each, and how many pixels of it are shown at most, from its top."""


def photograph(report: Path, folder: Path) -> list[Path]:
    """The pictures made, in the order of `SECTIONS`."""
    if not report.is_file():
        sys.exit(f"{report}: not found; make demo writes it")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with sync_api.sync_playwright() as driver:
        chromium = os.environ.get("LLAVA_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(report.resolve().as_uri())
        for name, (title, height) in SECTIONS.items():
            section = page.locator("section", has=page.get_by_role("heading", name=title, exact=True))
            box = section.bounding_box() if section.count() else None
            if box is None:
                sys.exit(f"{report}: there is no section {title!r}; is it the demo's report?")
            clip = {**box, "height": min(box["height"], height)}
            page.screenshot(path=folder / name, full_page=True, clip=clip)
            made.append(folder / name)
        browser.close()
    return made


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for picture in photograph(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER):
        print(picture)
