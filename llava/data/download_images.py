"""Fetch the images of LLaVA-Med out of PubMed Central's article archives: many at once, at a limited rate, resumable.

    python -m llava.data.download_images --input_path data/llava_med_image_urls.jsonl \\
        --pmc_output_path data/pmc_articles --images_output_path data/images

Killed or stopped, the same command goes on where it was. What can't be had is listed with its reason.
"""

import sys
import time
from collections import Counter
from pathlib import Path

from llava.commandline import ArgumentParser, existing_file, run, write_line
from llava.data.fetching.articles import OA_SERVICE
from llava.data.fetching.settings import Limits, Settings
from llava.errors import LlavaError, amount

EXIT_TOO_MANY_FAILURES = 1
FAILURES_FILE = "download_failures.jsonl"
MEAN_IMAGE_BYTES = 96_000
"""69 GB over 721,154 images."""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input_path", required=True, help="llava_med_image_urls.jsonl, or a list like it")
    parser.add_argument("--images_output_path", required=True, help="gets <pair_id>.jpg and the list of failures")
    parser.add_argument("--pmc_output_path", help="where whole archives go with --keep-archives; else not used")
    parser.add_bool("--keep-archives", help="keep every archive (3.6 TB in all); kept ones are read instead of fetched")
    parser.add_argument("--failures", help=f"list of failures (JSONL); default: {FAILURES_FILE} next to the images")
    parser.add_bool("--retry-failed", help="ask again also for what an earlier run found to be gone for good")
    parser.add_argument("--max-failures", type=int, help="exit with 1 if more images than this failed")
    parser.add_argument("--limit", type=int, help="number of lines to read from the start of the list")
    speed = parser.add_argument_group("how fast")
    speed.add_argument("--connections", type=int, default=Settings.connections, help="archives fetched at once")
    speed.add_argument(
        "--requests-per-second",
        type=float,
        default=Limits.requests_per_second,
        help="over all connections; 0: no limit",
    )
    speed.add_argument("--retries", type=int, default=Limits.retries, help="after a failed connection, a 429 or a 5xx")
    speed.add_argument(
        "--backoff", type=float, default=Limits.backoff, help="seconds before the first retry, then doubled"
    )
    speed.add_argument("--oa-service", default=OA_SERVICE, help='second source of dead articles; "" asks none')
    caps = parser.add_argument_group("how much")
    caps.add_argument("--timeout", type=float, default=Limits.timeout, help="seconds without a byte")
    caps.add_argument("--article-timeout", type=float, default=Limits.article_timeout, help="seconds for one archive")
    caps.add_argument(
        "--max-image-mb", type=float, default=Limits.max_image_bytes / 1e6, help="larger images are not saved"
    )
    caps.add_argument(
        "--max-article-mb", type=float, default=Limits.max_article_bytes / 1e6, help="larger archives are given up"
    )
    caps.add_argument(
        "--max-unpacked-mb",
        type=float,
        default=Limits.max_unpacked_bytes / 1e6,
        help="archives are unpacked no further",
    )
    caps.add_argument(
        "--min-free-gb", type=float, default=Settings.min_free_bytes / 1e9, help="stop when less disk space is free"
    )
    return parser


def main(argv=None) -> int:
    from llava.bars import tqdm
    from llava.data.fetching.articles import read_plan
    from llava.data.fetching.journal import Journal
    from llava.data.fetching.workers import download

    args = build_parser().parse_args(argv)
    settings = _settings(args)
    plan = read_plan(existing_file(args.input_path, "--input_path"), args.limit)
    folder = Path(args.images_output_path)
    journal = Journal(folder, Path(args.failures) if args.failures else folder / FAILURES_FILE)
    for image, url, reason in plan.refused:
        journal.add_failure(image, url, reason, permanent=True)
    articles, there, given_up = _left_to_do(plan.articles, journal, args.retry_failed)
    left = sum(len(article.images) for article in articles)
    _check_disk(folder, left, settings.min_free_bytes)
    write_line(
        f"{amount(plan.images, 'image')} listed: {there:,} there already, {given_up:,} known to be gone, "
        f"{len(plan.refused):,} refused, {amount(plan.duplicates, 'line')} listed again, "
        f"{left:,} to fetch from {amount(len(articles), 'article')}"
    )
    started = time.monotonic()
    # The bar's rate and time left are in images; it is drawn on stderr only.
    with tqdm(total=left, unit="pic", smoothing=0.05, disable=not sys.stderr.isatty()) as progress:
        try:
            totals = download(articles, journal, settings, progress)
        except BaseException:
            journal.close()
            raise
    failures = _failures(plan, journal, totals.saved_pairs)
    journal.finish(failures)
    _summary(totals, there, failures, journal.failures, time.monotonic() - started)
    too_many = args.max_failures is not None and len(failures) > args.max_failures
    return EXIT_TOO_MANY_FAILURES if too_many else 0


def _settings(args):
    for name in ("connections", "timeout", "article_timeout", "max_image_mb", "max_article_mb", "max_unpacked_mb"):
        if getattr(args, name) <= 0:
            raise LlavaError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0")
    for name in ("requests_per_second", "retries", "backoff", "min_free_gb", "limit"):
        if (getattr(args, name) or 0) < 0:
            raise LlavaError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    if args.keep_archives and not args.pmc_output_path:
        raise LlavaError("--keep-archives: say where with --pmc_output_path")
    limits = Limits(
        timeout=args.timeout,
        article_timeout=args.article_timeout,
        retries=args.retries,
        backoff=args.backoff,
        requests_per_second=args.requests_per_second,
        max_image_bytes=int(args.max_image_mb * 1e6),
        max_article_bytes=int(args.max_article_mb * 1e6),
        max_unpacked_bytes=int(args.max_unpacked_mb * 1e6),
    )
    return Settings(
        connections=args.connections,
        limits=limits,
        oa_service=args.oa_service or None,
        keep_archives=Path(args.pmc_output_path) if args.keep_archives else None,
        min_free_bytes=int(args.min_free_gb * 1e9),
    )


def _left_to_do(articles, journal, retry_failed: bool):
    """(articles with the images still to fetch, how many images are there, how many are known to be gone)."""
    from llava.data.fetching.articles import Article

    left, there, given_up = [], 0, 0
    for article in articles:
        images = []
        for image in article.images:
            if journal.is_there(image):
                there += 1
            elif not retry_failed and (journal.failure_of(image, article.url) or {}).get("permanent"):
                given_up += 1
            else:
                images.append(image)
        if images:
            left.append(Article(article.url, images))
    return left, there, given_up


def _check_disk(folder: Path, images: int, keep_free: int) -> None:
    import logging
    import shutil

    free, needed = shutil.disk_usage(folder).free, images * MEAN_IMAGE_BYTES
    if free < needed + keep_free:
        logging.getLogger(__name__).warning(
            "%s has %.1f GB free; %s images take about %.1f GB. The download stops when %.1f GB are left",
            folder, free / 1e9, f"{images:,}", needed / 1e9, keep_free / 1e9,
        )  # fmt: skip


def _failures(plan, journal, saved_pairs: set[str]) -> list[dict]:
    """The failures in the list's order; what came in the end, or isn't listed any more, is none."""
    found = [(image, url) for image, url, _ in plan.refused]
    for article in plan.articles:
        for image in article.images:
            if not journal.is_there(image) and image.pair_id not in saved_pairs:
                found.append((image, article.url))
    found.sort(key=lambda pair: pair[0].number)
    return [journal.failure_of(image, url) for image, url in found]


def _summary(totals, there: int, failures: list[dict], path: Path, seconds: float) -> None:
    write_line(
        f"{amount(totals.saved, 'image')} saved ({totals.saved_bytes / 1e6:,.1f} MB) out of "
        f"{totals.received_bytes / 1e6:,.1f} MB received with {amount(totals.requests, 'request')} in "
        f"{seconds:,.1f} s; {there + totals.saved:,} there now"
    )
    write_line(f"{amount(len(failures), 'image')} failed; each with its reason in {path}")
    for reason, count in Counter(failure["reason"] for failure in failures).most_common():
        write_line(f"  {count:,}: {reason}")


if __name__ == "__main__":
    run(main)
