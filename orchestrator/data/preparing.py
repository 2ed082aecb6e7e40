"""Data file -> tokens in a cache, once: later runs with the same file, tokenizer and settings only map the arrays."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config.job import DataConfig, ObjectiveConfig
from orchestrator.data.conversations import FORMATS, BadRow, Messages, find_format, to_messages
from orchestrator.data.sources import read_rows, resolve
from orchestrator.data.store import FORMAT_VERSION, BrokenStore, DataSummary, SkippedRows, StoreWriter, TokenisedData
from orchestrator.errors import ConfigError, DataError, ResourceError

if TYPE_CHECKING:
    from orchestrator.objectives.sft import ChatTemplate, Rendered

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TRAIN_ON = ("assistant", "last", "all")
CHOICES = {"data.on_bad_row": ("error", "skip"), "objective.name": ("sft",), "objective.train_on": TRAIN_ON}
BATCH_ROWS = 512
SKIP_HINT = "mend the row, or skip and count such rows with data.on_bad_row=skip"
HINTS = {
    "unknown columns": "rename the columns, for example to prompt and completion (docs: data.md lists the formats)",
    "nothing to learn after the cut": "a larger batch.sequence_tokens=N, or data.on_bad_row=skip",
}


@dataclass(frozen=True)
class _Request:
    """All that the tokens depend on, apart from the contents of the files."""

    file: Path
    tokenizer_folder: Path
    sequence_tokens: int
    on_bad_row: str
    train_on: str


@dataclass
class _Tally:
    """Counts bad rows by reason, or raises at the first one."""

    file: Path
    on_bad_row: str
    skipped: dict[str, SkippedRows] = field(default_factory=dict)

    def bad(self, place: str, row: BadRow) -> None:
        if self.on_bad_row == "error":
            raise DataError(f"{self.file}, {place}: {row}", HINTS.get(row.kind, SKIP_HINT))
        before = self.skipped.get(row.kind) or SkippedRows(row.kind, 0, place, str(row))
        self.skipped[row.kind] = SkippedRows(row.kind, before.count + 1, before.first_place, before.first_message)


def prepare(
    data: DataConfig, objective: ObjectiveConfig, tokenizer_folder: Path, sequence_tokens: int, cache_folder: Path
) -> TokenisedData:
    """Tokenise a data set, or map the tokens that an earlier call left in ``cache_folder``.

    A filled cache needs neither transformers nor torch. Processes that fill it at once do the same work and the last
    one finds it done: let one process per node call this first.

    Args:
        tokenizer_folder: Hugging Face folder with ``tokenizer.json`` and a chat template.
        sequence_tokens: longest row; longer ones are cut there and counted.
    Raises:
        ConfigError: no such file, an unknown file type or setting, no tokenizer or chat template, or a template that
            does not show what the assistant says.
        DataError: a bad row (with ``data.on_bad_row=error``), a broken file, or no row that can be learned from.
        ResourceError: the cache cannot be written (no space left, no permission).
    """
    _check_choices({"data.on_bad_row": data.on_bad_row, "objective.name": objective.name}, objective, sequence_tokens)
    file = resolve(data.path)
    request = _Request(file, tokenizer_folder, sequence_tokens, data.on_bad_row, objective.train_on)
    source_sha256 = _file_sha256(file, "data.path")
    key = _cache_key(request, source_sha256)
    try:
        return _open(cache_folder / key, key, file)
    except BrokenStore:
        pass
    try:
        return _fill(request, cache_folder, key, source_sha256)
    except OSError as error:
        message = f"the token cache in {cache_folder} cannot be filled ({error.strerror})"
        raise ResourceError(message, f"df -h {cache_folder} shows the space that is left there") from error


def _check_choices(settings: dict[str, str], objective: ObjectiveConfig, sequence_tokens: int) -> None:
    for name, value in {**settings, "objective.train_on": objective.train_on}.items():
        if value not in CHOICES[name]:
            raise ConfigError(f"{name}={value} is unknown", f"{name}={CHOICES[name][0]}")
    if sequence_tokens < 2:
        message = f"batch.sequence_tokens={sequence_tokens} leaves nothing to predict: a row needs at least 2 tokens"
        raise ConfigError(message, "batch.sequence_tokens=512")


def _file_sha256(file: Path, key: str) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read ({error.strerror})", f"ls -l {file}") from None


def _cache_key(request: _Request, source_sha256: str) -> str:
    folder = request.tokenizer_folder
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise ConfigError(
            f"model.path: {folder} has no {TOKENIZER_FILES[0]}", "set model.path to a folder with the tokenizer's files"
        )
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    parts = {
        "format_version": FORMAT_VERSION,
        "source": [request.file.suffix.lower(), source_sha256],
        "tokenizer": {file.name: _file_sha256(file, "model.path") for file in files},
        "sequence_tokens": request.sequence_tokens,
        "on_bad_row": request.on_bad_row,
        "train_on": request.train_on,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, key: str, file: Path) -> TokenisedData:
    data = TokenisedData.open(folder, source=str(file))
    if data.summary.key != key:
        raise BrokenStore(f"{folder} holds the entry {data.summary.key}")
    return data


def _fill(request: _Request, cache_folder: Path, key: str, source_sha256: str) -> TokenisedData:
    """Write the entry aside, then rename it into its place; a whole entry that came first stays."""
    cache_folder.mkdir(parents=True, exist_ok=True)
    final = cache_folder / key
    with tempfile.TemporaryDirectory(dir=cache_folder, prefix=".filling-") as aside:
        fresh, broken = Path(aside) / "fresh", Path(aside) / "broken"
        fresh.mkdir()
        _tokenise(request, fresh, key, source_sha256)
        try:
            return _open(final, key, request.file)
        except BrokenStore:
            if final.exists():
                final.rename(broken)
            _rename_first(fresh, final)
    _sync_folder(cache_folder)
    return _open(final, key, request.file)


def _rename_first(fresh: Path, final: Path) -> None:
    """Rename, unless another process has put the same entry there a moment ago."""
    try:
        fresh.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tokenise(request: _Request, folder: Path, key: str, source_sha256: str) -> None:
    from orchestrator.objectives import sft

    tokenizer = sft.load_tokenizer(request.tokenizer_folder)
    template = sft.chat_template(tokenizer, request.tokenizer_folder)
    tally = _Tally(request.file, request.on_bad_row)
    cut_rows = 0
    with StoreWriter(folder) as writer:
        for batch in _batches(_rendered(request, template, tally)):
            encoded = sft.encode(tokenizer, [rendered for _, rendered in batch])
            for (place, _), row in zip(batch, encoded, strict=True):
                tokens, learned = row.tokens[: request.sequence_tokens], row.learned[: request.sequence_tokens]
                if not learned[1:].any():
                    tally.bad(place, _nothing_learned(row, request.sequence_tokens))
                    continue
                cut_rows += len(row.tokens) > len(tokens)
                writer.add(tokens, learned)
        if writer.rows == 0:
            raise _no_rows(tally)
        writer.finish(
            DataSummary(
                key=key,
                source=str(request.file),
                source_sha256=source_sha256,
                rows=writer.rows,
                tokens=writer.tokens,
                label_tokens=writer.label_tokens,
                longest_row_tokens=writer.longest_row_tokens,
                cut_rows=cut_rows,
                sequence_tokens=request.sequence_tokens,
                pad_token=tokenizer.pad_token_id or 0,
                skipped=tuple(tally.skipped.values()),
            )
        )


def _nothing_learned(row: Any, sequence_tokens: int) -> BadRow:
    if len(row.tokens) <= sequence_tokens:
        return BadRow("nothing to learn", "the chat template leaves no token to learn")
    first = int(row.learned.argmax()) + 1
    return BadRow(
        "nothing to learn after the cut",
        f"no token to learn is left of {len(row.tokens)} after the cut at batch.sequence_tokens={sequence_tokens} "
        f"(the first one is token {first})",
    )


def _no_rows(tally: _Tally) -> DataError:
    if not tally.skipped:
        return DataError(f"{tally.file} holds no rows", "data=lighthouse is a data set to try with")
    reasons = "; ".join(f"{row.reason}: {row.count}, first at {row.first_place}" for row in tally.skipped.values())
    return DataError(f"no row of {tally.file} can be learned from ({reasons})", "data.on_bad_row=error shows the first")


def _rendered(request: _Request, template: ChatTemplate, tally: _Tally) -> Iterator[tuple[str, Rendered]]:
    """The conversations of a file as text, with the place of each."""
    from orchestrator.objectives import sft

    for place, messages in _conversations(request.file, tally):
        try:
            yield place, sft.render(template, messages, request.train_on)
        except BadRow as row:
            tally.bad(place, row)
        except sft.AmbiguousTemplate as error:
            raise ConfigError(
                f"{request.file}, {place}: the chat template in {request.tokenizer_folder} is ambiguous: it does not "
                f"show what the assistant says ({error})",
                "objective.train_on=last  or  objective.train_on=all, or mark the template with {% generation %}",
            ) from error


def _conversations(file: Path, tally: _Tally) -> Iterator[tuple[str, Messages]]:
    """The rows of a file as messages; all are read in the format of the first row that shows one."""
    format_name: str | None = None
    for row in read_rows(file):
        try:
            if isinstance(row.value, BadRow):
                raise row.value
            format_name = format_name or find_format(row.value)
            if format_name is None:
                raise _unknown_columns(row.value)
            yield row.place, to_messages(row.value, format_name)
        except BadRow as bad:
            tally.bad(row.place, bad)


def _unknown_columns(row: Any) -> BadRow:
    if not isinstance(row, dict):
        return BadRow("wrong type", f"the row is a {type(row).__name__}, not an object with columns")
    known = "; ".join(" and ".join(columns) for columns, _ in FORMATS.values())
    found = ", ".join(sorted(map(str, row))) or "none"
    return BadRow("unknown columns", f"columns {found}: none of the formats that are known ({known})")


def _batches(rows: Iterable[tuple[str, Rendered]]) -> Iterator[list[tuple[str, Rendered]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, BATCH_ROWS)):
        yield batch
