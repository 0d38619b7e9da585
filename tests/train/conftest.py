"""What several of the training tests start from."""

from pathlib import Path

import pytest

from tests.tiny import make_llava


@pytest.fixture(scope="package")
def base(tmp_path_factory) -> Path:
    """A tiny LLaVA, trained from by many tests and changed by none."""
    return make_llava(tmp_path_factory.mktemp("base"))
