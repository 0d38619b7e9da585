"""Little memory: what fits is answered, what doesn't ends alone, and says so."""

import pytest

from llava.errors import ImageError
from llava.generation import Engine, OutOfMemory
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


@pytest.mark.parametrize("has_other", [False, True])
def test_an_answer_that_takes_all_memory_ends_there_and_the_others_go_on(llama, caplog, has_other):
    endless, short = ask("Hi", max_new_tokens=300, ignore_eos=True), ask("Yes", max_new_tokens=5, ignore_eos=True)
    (prompt,) = positions(llama, endless)
    engine = paged(llama, prompt + 100, prefix_bytes=0)
    room = engine.scheduler.runner.cache.num_pages * engine.scheduler.runner.cache.page
    with caplog.at_level("WARNING"):
        answers = engine.generate([endless, *[short] * has_other])
    # The last token is never read, so it takes no position.
    assert [len(answer.token_ids) for answer in answers] == [room - prompt + 1, *[5] * has_other]
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert answers[0].token_ids == Engine(llama).generate([endless])[0].token_ids[: room - prompt + 1]
    assert "takes all of the engine's cache_bytes" in caplog.text


def test_what_waited_for_memory_may_have_all_of_it(llama):
    """Two answers that each fit alone, but for less than a request is wanted to find when it is taken in."""
    requests = [ask(words, max_new_tokens=70, ignore_eos=True) for words in ("Hi", "Yes")]
    expected = [answer.token_ids for answer in Engine(llama).generate(requests)]
    engine = paged(llama, max(positions(llama, *requests)) + 80, prefix_bytes=0)
    assert [answer.token_ids for answer in engine.generate(requests)] == expected
    assert engine.scheduler.counts.preempted == 0
    tight = paged(llama, max(positions(llama, *requests)) + 16, prefix_bytes=0)
    assert [len(answer.token_ids) > 0 for answer in tight.generate(requests)] == [True, True]


def test_of_several_requests_the_one_that_fails_is_named(llama):
    """Whatever it fails for: an image without a name of its own, memory, a file."""
    large = ask("left right " * 60, id="large")
    with pytest.raises(OutOfMemory, match="request 'large': a prompt of"):
        paged(llama, 100).generate([ask("Hi", id="small"), large])
    for image, words in ((b"no image", "not an image that can be read"), ("none.png", "image not found")):
        with pytest.raises(Exception, match=f"request 7: .*{words}") as caught:
            Engine(llama).generate([ask("Hi", id=6), ask("Hi", [image], id=7)])
        assert isinstance(caught.value, ImageError) == (words != "image not found")
