"""What a soak came to: figures of what was asked and seen, and which aims they miss."""

import re
from collections import Counter
from collections.abc import Iterable

from tests.faults.soak.faults import Outage
from tests.faults.soak.load import Request
from tests.faults.soak.stack import Sample
from tests.serve.health import Look

ANSWERED = 0.999
GROWTH = 0.02
MORE_FILES = 3
JUDGED_SECONDS = 600.0  # of a life: a shorter one is mostly warm-up
EXCEPTED = {"worker_lost"}


def answers(requests: list[Request], kills: list[float]) -> dict:
    """How many well-formed requests were answered, without those that a killed worker took with it; and refusals."""
    well_formed = [request for request in requests if not request.is_refused]
    lost = [request for request in well_formed if request.lost]
    excepted = [
        request
        for request in lost
        if request.lost in EXCEPTED and any(request.asked <= kill <= request.ended for kill in kills)
    ]
    counted = len(well_formed) - len(excepted)
    refused = [request for request in requests if request.is_refused]
    return {
        "well_formed": len(well_formed),
        "answered": len(well_formed) - len(lost),
        "in_flight_on_a_killed_worker": len(excepted),
        "answered_share": round((len(well_formed) - len(lost)) / max(1, counted), 6),
        "sent_again": dict(Counter(request.again for request in well_formed if request.again)),
        "refused_as_it_has_to_be": sum(request.lost is None for request in refused),
        "refused_otherwise": dict(Counter(request.lost for request in refused if request.lost)),
    }


def memory(samples: list[Sample]) -> dict[str, dict]:
    """Of each server's longest life under the load: MB after a third of it, which is the baseline (its seconds are
    given), and at its end, and the growth.

    Of a time it is the least: bodies on their way, some of them of 27 MB, come on top and go; what is kept is in every
    moment.
    """
    lives: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        lives.setdefault((sample.name, sample.pid), []).append(sample)
    longest: dict[str, list[Sample]] = {}
    for (name, _), life in lives.items():
        if len(life) > len(longest.get(name, ())):
            longest[name] = life
    found = {}
    for name, life in sorted(longest.items()):
        part = max(1, len(life) // 12)
        settled, late = life[4 * part : 5 * part] or life, life[-part:]
        sizes = {
            what: [min(getattr(sample, what) for sample in some) for some in (settled, late)] for what in ("rss", "pss")
        }
        seconds = life[-1].when - life[0].when
        found[name] = {
            "seconds": round(seconds),
            "is_judged": seconds >= JUDGED_SECONDS,
            "baseline_seconds": [round(settled[end].when - life[0].when) for end in (0, -1)],
            **{f"{what}_mb": [round(size / 1e6, 1) for size in pair] for what, pair in sizes.items()},
            **{f"{what}_growth": round(pair[1] / pair[0] - 1, 4) for what, pair in sizes.items()},
            "rss_mb_over_time": [round(sample.rss / 1e6, 1) for sample in life[:: max(1, len(life) // 24)]],
        }
    return found


def files(samples: list[Sample], before: dict[str, int], after: dict[str, int]) -> dict[str, dict]:
    """Open files of each server in quiet before and after the load, and the most that were seen meanwhile."""
    most: Counter[str] = Counter()
    for sample in samples:
        most[sample.name] = max(most[sample.name], sample.files)
    return {name: {"before": count, "after": after.get(name), "most": most[name]} for name, count in before.items()}


def in_order(looks: list[Look], outages: list[Outage]) -> list[Look]:
    """The looks at servers that no fault kept from answering."""
    return [look for look in looks if look.status and not _is_out(look, outages)]


def silent(looks: list[Look], outages: list[Outage]) -> dict[str, int]:
    """How often a server gave no answer without a fault that explains it."""
    return dict(Counter(look.server for look in looks if look.status != 200 and not _is_out(look, outages)))


def _is_out(look: Look, outages: list[Outage]) -> bool:
    own = (each for each in outages if each.server == look.server)
    return any(each.began <= look.answered and look.asked <= each.ended for each in own)


def missed(figures: dict) -> list[str]:
    """The aims that a run has missed."""
    found = []
    if figures["answered_share"] < ANSWERED:
        found.append(f"answered: {figures['answered_share']:.4%} of the well-formed requests, not {ANSWERED:.1%}")
    for what in ("refused_otherwise", "faults_wrong", "health_not_answered", "wrong_in_the_logs"):
        if figures[what]:
            found.append(f"{what}: {figures[what]}")
    for name, each in figures["memory"].items():
        if each["is_judged"] and each["rss_growth"] >= GROWTH:
            found.append(f"memory of {name}: {each['rss_growth']:+.2%}")
    for name, each in figures["files"].items():
        if each["after"] is not None and each["after"] > each["before"] + MORE_FILES:
            found.append(f"open files of {name}: {each['before']} before, {each['after']} after")
    if figures["exit_code"] != 0:
        found.append(f"llava.serve ended with {figures['exit_code']}")
    return found


def wrong_in(log: str) -> dict[str, int]:
    """Tracebacks, by the line that says what happened."""
    parts = re.split(r"Traceback \(most recent call last\):", log)[1:]
    said = (re.search(r"^ *([\w.]+(Error|Exception).*)$", part, re.MULTILINE) for part in parts)
    return dict(Counter(found[1] if found else part[:200] for found, part in zip(said, parts, strict=True)))


def by_kind(requests: Iterable[Request]) -> dict[str, dict]:
    """By kind: how many there were, and what became of them; seconds from the first try to the end."""
    found: dict[str, dict] = {}
    kinds: dict[str, list[Request]] = {}
    for request in requests:
        kinds.setdefault(request.kind, []).append(request)
    for kind, same in sorted(kinds.items()):
        times = sorted(request.ended - request.asked for request in same)
        found[kind] = {
            "asked": len(same),
            "as it has to be": sum(request.lost is None for request in same),
            "sent again": sum(request.again for request in same),
            "lost": dict(Counter(request.lost for request in same if request.lost)),
            "seconds_p50": round(times[len(times) // 2], 3),
            "seconds_p99": round(times[len(times) * 99 // 100], 3),
        }
    return found
