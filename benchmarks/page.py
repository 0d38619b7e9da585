"""The web page in Chromium: how soon the server is up, how soon something is seen, how fast a CT series scrolls.

python benchmarks/page.py --json out.json

Page, a scripted worker that computes nothing, and the browser share the machine. A slice counts once its image has been
drawn; the next one is asked for only then. `first_slices` weren't seen before, `slices` were.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from checkout import add_json_flag, show
from playwright.sync_api import sync_playwright

from tests.serve.browsing import CHROMIUM, ENV, FLAGS, PATIENCE, accept, add_files, expect, worker
from tests.serve.processes import Process
from tests.serve.test_web_scans import SLICES, series

NOISE = 20.0
"""Of a slice, in Hounsfield units, as in a CT of the chest: images without noise are packed in no time."""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
SCROLL = """async ([count, step, across]) => {
  const image = () => document.querySelector("#viewer img.large");
  const seen = (before) => new Promise((done) => {
    const look = () => {
      const now = image();
      if (now && now.src !== before && now.complete) { done(); } else { requestAnimationFrame(look); }
    };
    look();
  });
  const began = performance.now();
  for (let n = 0; n < count; n += 1) {
    const before = image().src;
    window.llavaMoveSlice(Math.floor(n / across) % 2 ? -step : step);
    await seen(before);
  }
  return performance.now() - began;
}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=5, help="loads of the page, each in an empty browser profile")
    parser.add_argument("--images", type=int, default=120, help="slices to show of each series that were seen before")
    parser.add_argument("--sides", type=int, nargs="+", default=[160, 512], help="pixels of a slice's side")
    add_json_flag(parser)
    args = parser.parse_args()
    results = {}
    with Process("llava.serve.controller", env=ENV) as controller, tempfile.TemporaryDirectory() as folder:
        controller.wait()
        started = time.perf_counter()
        words = ["--controller", controller.url]
        with (
            worker(controller, "scripted") as scripted,
            Process("llava.serve.gradio_web_server", *words, env=ENV, log=Path(folder) / "log") as web,
            sync_playwright() as driver,
        ):
            web.wait()
            results["page_start_seconds"] = time.perf_counter() - started
            scripted.wait()
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
            paints = []
            for _ in range(args.loads):
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                page.goto(web.url)
                expect(page.locator("#accept")).to_be_visible(timeout=PATIENCE)
                paints.append(page.evaluate(FIRST_PAINT))
                page.context.close()
            results["first_contentful_paint_ms"] = statistics.median(paints)
            results["first_contentful_paint_longest_ms"] = max(paints)
            for side in args.sides:
                files = Path(folder) / str(side)
                files.mkdir()
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                page.goto(web.url)
                accept(page, "scripted")
                add_files(page, series(files, side, NOISE), 1)
                expect(page.locator("#scan-place input[type=number]")).to_have_value(str(SLICES // 2), timeout=PATIENCE)
                page.locator("[data-image='0']").focus()
                page.evaluate(f"window.llavaMoveSlice({-(SLICES // 2)})")
                page.wait_for_timeout(2000)
                across = SLICES - 1
                for name, count, step in (("first_", across, 1), ("", args.images, -1)):
                    spent = page.evaluate(SCROLL, [count, step, across]) / 1000
                    results[f"{name}slices_per_second_{side}"] = count / spent
                page.context.close()
    show(f"the page, {args.loads} loads, series of {SLICES}", results, args.json)


if __name__ == "__main__":
    main()
