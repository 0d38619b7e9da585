"""What a client sends can't forge a line of a log, nor fill the disk."""

import logging
import random

import httpx

from llava.commandline import SafeFormatter
from llava.errors import MOST_LINE, LlavaError, one_line


def written(text, **more):
    record = logging.LogRecord("llava", logging.WARNING, "", 0, "model %s asked for", (text,), None)
    return SafeFormatter("%(levelname)s %(name)s: %(message)s").format(record)


def test_line_ends_and_escapes_are_shown():
    forged = "x\nERROR llava: key stolen\r\u2028\x1b[2J\x85\ud800"
    assert written(forged).splitlines() == [
        r"WARNING llava: model x\nERROR llava: key stolen\r\u2028\x1b[2J\x85\ud800 asked for"
    ]
    assert (
        logging.Formatter("%(levelname)s %(message)s")
        .format(logging.LogRecord("llava", logging.WARNING, "", 0, forged, (), None))
        .splitlines()[1]
        .startswith("ERROR")
    )
    assert one_line("Lunge 肺 ±5 °C") == "Lunge 肺 ±5 °C"


def test_long_ones_are_cut_and_that_is_said():
    line = written("m" * 31_000_000)
    assert len(line) < 2 * MOST_LINE and "31000016 characters" in line


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(LlavaError("a\nb\0c\x1b")) == r"a b\x00c\x1b"
    assert len(str(LlavaError("m" * 10**6))) < 2 * MOST_LINE


def test_any_text_is_one_printable_line():
    dice = random.Random(3)
    for _ in range(300):
        text = "".join(chr(dice.randrange(0x110000)) for _ in range(50))
        line = written(text)
        assert len(line.splitlines()) == 1 and line.isprintable() and line.encode()


def test_tracebacks_stand_apart():
    try:
        raise ValueError("x\nERROR llava: forged " + "y" * 100_000)
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("llava", logging.ERROR, "", 0, "failed", (), info)
    first, *rest = SafeFormatter("%(levelname)s %(name)s: %(message)s").format(record).split("\n")
    assert first == "ERROR llava: failed" and len(rest) >= 4
    assert all(line.startswith("  ") and len(line) < 2 * MOST_LINE for line in rest)


FORGED = "x\nERROR llava: forged"


def test_a_name_forges_no_line_of_a_server(stack):
    before = {piece: len(stack[piece].log.read_text()) for piece in ("api", "controller", "worker")}
    for name in (FORGED, "m" * (8 << 20)):
        body = {"model": name, "messages": [{"role": "user", "content": "hello"}]}
        url = stack["api"].url + "/v1/chat/completions"
        assert httpx.post(url, json=body, headers=stack.credentials("api"), timeout=60).status_code in (400, 503)
        body = {"worker_name": name, "model": name, "prompt": "hello", "worker_status": {"model_names": [name]}}
        for route in ("/register_worker", "/unregister_worker", "/get_worker_address", "/worker_generate_stream"):
            url = stack["controller"].url + route
            assert httpx.post(url, json=body, headers=stack.credentials("controller"), timeout=60).status_code < 500
        url = stack["worker"].url + "/worker_generate_stream"
        httpx.post(url, json=body, headers=stack.credentials("worker"), timeout=60).raise_for_status()
        httpx.get(stack["api"].url + "/%0aERROR%20llava:%20forged", headers=stack.credentials("api"))
    for piece, length in before.items():
        added = stack[piece].log.read_text()[length:]
        assert len(added) < 10 * MOST_LINE
        assert not [line for line in added.splitlines() if line.startswith("ERROR")], added


def test_a_plain_log_can_be_forged(stack):
    httpx.get(stack["open"].url, headers={"x-model": FORGED.replace("\n", "\\n")})
    assert [line for line in stack["open"].log.read_text().splitlines() if line.startswith("ERROR llava: forged")]
