"""axe-core's findings about a page in Chromium."""

import pytest

SERIOUS = ("serious", "critical")


def findings(page) -> list[str]:
    """What axe-core calls serious or critical, a line each."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python isn't installed")
    return [
        f"{each['id']}: {node['html'][:200]} {node.get('failureSummary', '')[:200]}"
        for each in axe.Axe().run(page).response["violations"]
        if each["impact"] in SERIOUS
        for node in each["nodes"]
    ]
