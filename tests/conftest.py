from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ISOTRAIN_LEDGER"] = ""  # what this machine's user has run or measured is no part of any test
os.environ["ISOTRAIN_PROFILES"] = "/dev/null/profiles"
# Ignored in what a script starts with &, and then in all that is started here: no Ctrl-C would arrive.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings

from tests.helpers import runs
from tests.helpers.pool import Pool

settings.register_profile("isotrain", deadline=None)  # nothing here is a test of this machine's speed
settings.load_profile("isotrain")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four worker processes, shared by every multi-process test of the session."""
    workers = Pool(4)
    yield workers
    workers.leave()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face folder, converted once into the user's cache."""
    from orchestrator.smollm2 import make_model

    return make_model()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny random models made by transformers itself: ``tiny_model("qwen3", vocab_size=97)``."""
    made: dict[Any, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = (family, json.dumps(changes, sort_keys=True))
        if key not in made:
            made[key] = _save_tiny(runs.config(family, **changes), tmp_path_factory.mktemp(family))
        return made[key]

    return make


def _save_tiny(mapping: dict[str, Any], folder: Path) -> Path:
    from orchestrator.certify.outside import make_model

    make_model(mapping, folder, seed=7)
    return folder
