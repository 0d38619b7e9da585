"""The checkpoint that other tools' calls are tried on."""

import os
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """LLAVA_DROP_IN names another one, such as the demo's."""
    named = os.environ.get("LLAVA_DROP_IN")
    return Path(named) if named else tiny.make_llava(tmp_path_factory.mktemp("drop_in"))
