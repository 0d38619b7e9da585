"""Settings of a server of language models: flags over the environment, and what can't be one."""

import pytest

from llava.commandline import ArgumentParser
from llava.errors import LlavaError
from llava.openai_api import add_api_flags, settings_from_args


def parsed(*words):
    parser = ArgumentParser()
    add_api_flags(parser)
    return parser.parse_args(words)


def test_settings_come_from_flags_over_environment():
    env = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://a/v1"}
    got = settings_from_args(parsed("--api-model", "x"), env)
    assert (got.model, got.api_key, got.base_url) == ("x", "k", "http://a/v1")
    assert settings_from_args(parsed("--api-model", "x", "--api-base", "http://b/v1"), env).base_url == "http://b/v1"
    azure = {"AZURE_OPENAI_ENDPOINT": "http://z", "AZURE_OPENAI_API_KEY": "a", "AZURE_OPENAI_DEPLOYMENT": "d"}
    got = settings_from_args(parsed("--api-version", "v"), azure)
    assert (got.model, got.api_key, got.azure_endpoint, got.base_url) == ("d", "a", "http://z", None)


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["--api-model", "x"], {}, "OPENAI_API_KEY"),
        ([], {"AZURE_OPENAI_ENDPOINT": "e", "AZURE_OPENAI_API_KEY": "k"}, "OPENAI_API_VERSION"),
        (["--api-model", "x", "--concurrency", "0"], {"OPENAI_API_KEY": "k"}, "--concurrency"),
        (
            ["--api-model", "x", "--api-base", "localhost:9/v1"],
            {},
            "localhost:9/v1 is no address of a server; it begins",
        ),
    ],
)
def test_missing_settings_are_named(words, env, message):
    with pytest.raises(LlavaError, match=message):
        settings_from_args(parsed(*words), env)


@pytest.mark.parametrize(
    "flag",
    [
        *("concurrency", "requests-per-minute", "tokens-per-minute", "request-timeout", "max-retries"),
        *("price-in", "price-out", "max-cost"),
    ],
)
def test_numbers_below_what_they_can_be_are_named(flag):
    """A negative timeout let each item fail after all its tries, a negative price broke the limit of money."""
    with pytest.raises(LlavaError, match=f"--{flag} is -1(.0)?; give "):
        settings_from_args(parsed("--api-model", "x", f"--{flag}", "-1"), {"OPENAI_API_KEY": "k"})
    if flag not in ("concurrency", "max-retries"):
        with pytest.raises(LlavaError, match=f"--{flag} is nan"):
            settings_from_args(parsed("--api-model", "x", f"--{flag}", "nan"), {"OPENAI_API_KEY": "k"})
