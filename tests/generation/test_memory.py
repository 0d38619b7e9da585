"""Little memory: what fits is answered, what doesn't ends alone, and says so."""

from llava.generation import Engine
from tests.generation.conftest import ask


def positions(loaded, *requests) -> list[int]:
    engine = Engine(loaded)
    return [len(engine.prompts.build(request)) for request in requests]


def paged(loaded, count: int, **options) -> Engine:
    """An engine with pages for `count` positions."""
    size = Engine(loaded).scheduler.runner.bytes_per_position
    return Engine(loaded, paged=True, cache_bytes=count * size, feature_bytes=0, **options)


def test_a_kept_beginning_makes_way_for_a_prompt_that_shares_a_part_of_it(llama):
    """Its pages are free for the second try: nothing of the first, which failed for want of memory, holds them."""
    first, second = (ask(words * 60, max_new_tokens=2, ignore_eos=True) for words in ("left right ", "no yes "))
    longest = max(positions(llama, first, second))
    engine = paged(llama, longest + 40, prefix_bytes=1 << 30)
    for request in (first, second):
        with engine.submit(request) as handle:
            list(handle)
        assert len(handle.answer.token_ids) == 2

