"""Debian's Chromium without a window: what a page becomes in it, what its console says, and how it looks.

By hand: ``python -m tests.pages.chromium PAGE.html FOLDER`` takes pictures, light and dark, wide and narrow.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

INSTALL = "apt-get install -y --no-install-recommends chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--proxy-server=127.0.0.1:9"),  # nobody answers there
)
LONGEST_S = 60


@dataclass(frozen=True)
class Rendered:
    """``dom``: the document after its scripts; ``console``: lines that the page, or the browser about it, logged."""

    dom: str
    console: list[str]


def browser() -> str | None:
    """The browser's path; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def rendered(page: Path) -> Rendered:
    """Open a page without a network."""
    out, errors = _run("--dump-dom", page.as_uri())
    return Rendered(out, [line for line in errors.splitlines() if ":CONSOLE" in line])


def picture(page: Path, file: Path, width: int, height: int, dark: bool = False) -> None:
    """Take a picture of the top of a page."""
    look = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _run(f"--screenshot={file}", f"--window-size={width},{height}", *look, page.as_uri())


def _run(*words: str) -> tuple[str, str]:
    """Run the browser in a session of its own, with files for its words, so that no helper of it outlives us."""
    name = browser()
    assert name is not None, INSTALL
    with tempfile.TemporaryDirectory(prefix="chromium") as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        argv = [name, *SWITCHES, f"--user-data-dir={folder}/profile", "--virtual-time-budget=2000", *words]
        with out.open("wb") as stdout, errors.open("wb") as stderr:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
            try:
                process.wait(LONGEST_S)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return out.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    shown, folder = Path(sys.argv[1]).absolute(), Path(sys.argv[2])
    height = int(sys.argv[3]) if len(sys.argv) > 3 else 3200
    for width in (1400, 700):
        for dark in (False, True):
            name = f"{shown.stem}-{width}-{'dark' if dark else 'light'}.png"
            picture(shown, folder / name, width, height, dark)
