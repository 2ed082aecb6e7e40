"""A folder for what an export or a conversion writes: it appears whole or not at all, and replaces only its like."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.folder import MARKER, explain, sync_folder, write_durably
from orchestrator.checkpoint.hf_reader import read_json
from orchestrator.checkpoint.load import WEIGHT_SUFFIXES
from orchestrator.checkpoint.tensor_file import TORCH_DTYPES
from orchestrator.errors import ConfigError


@contextlib.contextmanager
def fresh_folder(out: Path, needed_bytes: int, sources: Sequence[Path], about: Mapping[str, Any]) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when the block ends well, and is removed when it does not.

    Args:
        out: a new folder, an empty one, or an earlier one of the same kind.
        needed_bytes: said where the disk is full.
        sources: folders that are only read; ``out`` must not lie in them.
        about: for the marker; ``to`` is the kind of what is written.
    Raises:
        ConfigError: ``out`` holds something that is not ours, or cannot be written.
        ResourceError: no space is left.
    """
    _check_out(out, sources, str(about["to"]))
    out = out.absolute()
    token = secrets.token_hex(4)
    temporary, aside = (out.with_name(f".{out.name}.{what}-{token}") for what in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(path.name for path in temporary.iterdir())
        write_json(temporary / MARKER, {"written_by": "isotrain export", **about, "files": files})
        sync_folder(temporary)
        if out.exists():
            out.rename(aside)
        temporary.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise explain(error, out.parent, needed_bytes, "OUT") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _check_out(out: Path, sources: Sequence[Path], to: str) -> None:
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(f"{out} lies in {source}, which is only read", "choose a folder outside of it")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", "choose a folder that does not exist yet")
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    earlier = read_json(out / MARKER) if MARKER in found else {}
    if earlier.get("to", to) != to:
        raise ConfigError(f"{out} holds an export --to {earlier['to']}", "choose a folder that does not exist yet")
    ours = {MARKER, *earlier.get("files", ())} if earlier else set()
    if found - ours:
        raise ConfigError(
            f"{out} is not empty: {', '.join(sorted(found - ours)[:3])} did not come from an export",
            "choose a folder that does not exist yet",
        )


def copy_companions(folder: Path, target: Path, dtype: str | None = None) -> None:
    """Copy what is no weights of a model's or an adapter's folder: configuration, tokenizer. Raises OSError.

    Args:
        dtype: what ``config.json`` shall say that the weights are, as a safetensors code ("BF16"); None: as it says.
    """
    for name, content in companions(folder, dtype).items():
        if isinstance(content, Path):
            copy_file(content, target / name)
        else:
            write_durably(target / name, content)


def companions(folder: Path, dtype: str | None = None) -> dict[str, bytes | Path]:
    """What :func:`copy_companions` copies, by name: the file that is copied, or the new text of ``config.json``."""
    found: dict[str, bytes | Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name == MARKER or path.name.lower().endswith(WEIGHT_SUFFIXES):
            continue
        found[path.name] = path
        if path.name == "config.json" and dtype is not None:
            config = read_json(path)
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(TORCH_DTYPES[dtype])[len("torch.") :]
            found[path.name] = _json_bytes(config)
    return found


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes durably. Raises OSError."""
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    """Write a new JSON file durably. Raises OSError."""
    write_durably(path, _json_bytes(value))


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
