"""The downloader's server, and its list of images."""

import pytest

from tests.data.archive_server import ArchiveServer
from tests.data.wanted import Wanted


@pytest.fixture
def server():
    with ArchiveServer() as running:
        yield running


@pytest.fixture
def wanted(tmp_path, server):
    return Wanted(tmp_path, server)
