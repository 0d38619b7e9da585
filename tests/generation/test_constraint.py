"""Constraints of JSON schemas: made once for each schema, without holding up others; what ends an answer."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from llava.errors import LlavaError
from llava.generation.constraint import _MOST_KNOWN, Constraints
from tests.tiny import make_tokenizer

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def constraints(tokenizer):
    return Constraints(tokenizer, len(tokenizer))


def test_a_schema_is_compiled_once_and_holds_up_no_other(constraints):
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def check(schema):
        seen.append(schema)
        if "maxLength" in schema:
            begun.set()
            assert go_on.wait(60)

    constraints.check = check
    slow = {"type": "string", "maxLength": 3}
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(constraints.of_schema, slow, [2]) for _ in range(4)]
        try:
            assert begun.wait(60)
            threads.submit(constraints.of_schema, {"type": "integer"}, [2]).result(60)
            assert not any(work.done() for work in waiting)
        finally:
            go_on.set()
        assert len({id(work.result(60)) for work in waiting}) == 4
    assert seen.count(json.dumps(slow)) == 1


def test_who_waits_gets_the_refusal_but_not_that_somebody_left(constraints):
    begun, go_on, calls = threading.Event(), threading.Event(), []

    def check(schema):
        calls.append(schema)
        begun.set()
        assert go_on.wait(60)
        if len(calls) == 1:
            raise RuntimeError("left")
        raise LlavaError("json_schema: refused")

    constraints.check = check
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(constraints.of_schema, {"type": "integer"}, [2])
        assert begun.wait(60)
        others = [threads.submit(constraints.of_schema, {"type": "integer"}, [2]) for _ in range(3)]
        go_on.set()
        assert isinstance(first.exception(60), RuntimeError)
        assert {str(work.exception(60)) for work in others} == {"json_schema: refused"}


def test_few_schemas_are_kept_and_one_tokenizer(constraints):
    for number in range(3 * _MOST_KNOWN):
        constraints.of_schema({"const": number}, [number, 2])
    kept = constraints._library_tokenizer()
    assert len(constraints._known) == _MOST_KNOWN and not constraints._compiling
    constraints.of_schema({"const": 1}, [7])
    assert constraints._library_tokenizer() is kept


def allowed_ids(constraint):
    return set(constraint.allowed().nonzero()[0].tolist())


@pytest.mark.parametrize("ends", [(), (2,), (2, 9), (9,)])
def test_the_answers_own_ends_come_where_the_json_may_end(constraints, tokenizer, ends):
    constraint = constraints.of_schema({"enum": [1, 12]}, ends)
    one = tokenizer.encode("1", add_special_tokens=False)[-1]
    twos = {tokenizer.encode("2", add_special_tokens=False)[-1], tokenizer.convert_tokens_to_ids("<0x32>")}
    wanted = set(ends or (2,))
    assert one in allowed_ids(constraint) and not wanted & allowed_ids(constraint)
    constraint.take(one)
    assert allowed_ids(constraint) == wanted | twos
    constraint.take(max(wanted))
    assert allowed_ids(constraint) == wanted and constraint.error is None
