from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pages.chromium import INSTALL, Rendered, browser, rendered


@pytest.fixture(scope="session")
def opened() -> Callable[[Path], Rendered]:
    """What a page becomes in a real browser without a network."""
    if browser() is None:
        pytest.skip(f"chromium not found; pages are opened in a real browser after: {INSTALL}")
    return rendered
