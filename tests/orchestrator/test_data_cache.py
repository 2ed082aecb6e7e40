"""The token cache: filled once, found without transformers, rebuilt when it is not whole, never half-written."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.config.job import DataConfig, ObjectiveConfig
from orchestrator.data import TokenisedData, prepare, preparing
from orchestrator.data import store as store_module
from orchestrator.data.store import LEARNED, META, OFFSETS, TOKENS, BrokenStore
from orchestrator.errors import ConfigError, ResourceError
from tests.orchestrator.tiny_tokenizer import MARKED, load, write_tokenizer

ROWS = [{"prompt": f"hello {index}", "completion": "in " * (index + 1)} for index in range(5)]


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A data file, a tokenizer folder and a cache folder."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file, write_tokenizer(tmp_path / "tokenizer"), tmp_path / "cache"


def run(places: tuple[Path, Path, Path], tokens: int = 300, train_on: str = "assistant") -> TokenisedData:
    file, tokenizer, cache = places
    return prepare(DataConfig(str(file)), ObjectiveConfig(train_on=train_on), tokenizer, tokens, cache)


def entry(places: tuple[Path, Path, Path]) -> Path:
    """The only entry of the cache; nothing else may lie there."""
    (folder,) = places[2].iterdir()
    return folder


def test_the_arrays_and_the_summary_say_the_same(places: tuple[Path, Path, Path]) -> None:
    data = run(places)
    assert (data.tokens.dtype, data.learned.dtype, data.offsets.dtype) == (np.int32, np.bool_, np.int64)
    assert data.rows == data.summary.rows == len(ROWS) and len(data.tokens) == data.summary.tokens
    rows = [data.row(index) for index in range(data.rows)]
    assert data.summary.label_tokens == sum(int(learned[1:].sum()) for _, learned in rows)
    assert data.summary.longest_row_tokens == max(len(tokens) for tokens, _ in rows)
    assert np.concatenate([tokens for tokens, _ in rows]).tolist() == data.tokens.tolist()
    assert isinstance(data.tokens, np.memmap)
    assert data.summary.pad_token == load(places[1]).pad_token_id > 0


def test_a_filled_cache_is_found_without_transformers_or_torch(places: tuple[Path, Path, Path]) -> None:
    run(places)
    file, tokenizer, cache = places
    program = (
        "import sys; from pathlib import Path\n"
        "from orchestrator.data import prepare\nfrom orchestrator.config.job import DataConfig, ObjectiveConfig\n"
        f"data = prepare(DataConfig({str(file)!r}), ObjectiveConfig(), Path({str(tokenizer)!r}), 300, "
        f"Path({str(cache)!r}))\n"
        "print(data.rows, [name for name in ('transformers', 'torch', 'tokenizers', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split(maxsplit=1) == ["5", "[]\n"]


def test_whatever_changes_the_tokens_changes_the_entry(places: tuple[Path, Path, Path]) -> None:
    file, tokenizer, _ = places
    keys = [run(places).summary.key, run(places, tokens=100).summary.key, run(places, train_on="all").summary.key]
    (tokenizer / "chat_template.jinja").write_text(MARKED)
    keys.append(run(places).summary.key)
    with file.open("a") as lines:
        lines.write(json.dumps(ROWS[0]))
    keys.append(run(places).summary.key)
    assert len(set(keys)) == 5


def test_the_same_file_elsewhere_is_found_and_named_as_it_is_now(places: tuple[Path, Path, Path]) -> None:
    file, tokenizer, cache = places
    first = run(places)
    second = run((file.rename(file.with_name("other.jsonl")), tokenizer, cache))
    assert second.summary.key == first.summary.key and second.summary.source.endswith("other.jsonl")


def cut_file(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) - 8])

    return cut


def shorten_array(folder: Path) -> None:
    np.save(folder / LEARNED, np.load(folder / LEARNED)[:-1])


def shift_offsets(folder: Path) -> None:
    offsets = np.load(folder / OFFSETS)
    offsets[1] = offsets[2]
    np.save(folder / OFFSETS, offsets)


def change_meta(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / META).read_text())
        (folder / META).write_text(json.dumps({**fields, **changes}))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_file(TOKENS), "mmap length"),
        (cut_file(META), "is not whole"),
        (remove(TOKENS), "No such file"),
        (remove(META), "No such file"),
        (shorten_array, r"learned.npy is bool\[\d+\], not bool"),
        (shift_offsets, "does not cut"),
        (change_meta(rows=4), r"offsets.npy is int64\[6\], not int64\[5\]"),
        (change_meta(format_version=0), "another format version"),
        (change_meta(surprise=1), "is not whole"),
    ],
)
def test_an_entry_that_is_not_whole_is_built_again(
    places: tuple[Path, Path, Path], damage: Callable[[Path], None], message: str
) -> None:
    before = run(places).tokens.tolist()
    damage(entry(places))
    with pytest.raises(BrokenStore, match=message):
        TokenisedData.open(entry(places))
    assert run(places).tokens.tolist() == before
    assert TokenisedData.open(entry(places)).rows == len(ROWS)


def test_an_entry_under_a_wrong_name_is_built_again(places: tuple[Path, Path, Path]) -> None:
    key = run(places).summary.key
    change_meta(key="0" * 64)(entry(places))
    assert run(places).summary.key == key


def test_a_full_disk_is_said_and_leaves_nothing(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.StoreWriter, "add", full)
    with pytest.raises(ResourceError, match=r"cannot be filled .No space left on device") as caught:
        run(places)
    assert "df -h" in caught.value.hint and list(places[2].iterdir()) == []


def test_a_process_that_comes_second_takes_the_first_ones_entry(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenise, inodes = preparing._tokenise, []

    def overtaken(*arguments: Any) -> None:
        tokenise(*arguments)
        monkeypatch.setattr(preparing, "_tokenise", tokenise)
        inodes.append((places[2] / run(places).summary.key / TOKENS).stat().st_ino)

    monkeypatch.setattr(preparing, "_tokenise", overtaken)
    assert run(places).rows == len(ROWS)
    assert (entry(places) / TOKENS).stat().st_ino == inodes[0]


def test_an_entry_that_appears_just_before_the_rename_stays(tmp_path: Path) -> None:
    fresh, final = tmp_path / "fresh", tmp_path / "final"
    for folder in (fresh, final):
        folder.mkdir()
        (folder / META).write_text(folder.name)
    preparing._rename_first(fresh, final)
    assert (final / META).read_text() == "final"
    with pytest.raises(OSError, match="No such file"):
        preparing._rename_first(tmp_path / "nothing", final)


def test_a_folder_without_a_tokenizer_is_refused(places: tuple[Path, Path, Path]) -> None:
    (places[1] / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"model.path: .* has no tokenizer.json"):
        run(places)


def test_a_file_that_cannot_be_read_is_refused(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"data.path: .*data.jsonl cannot be read \(Permission denied\)"):
        run(places)
