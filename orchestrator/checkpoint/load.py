"""Opening checkpoints: checked against the manifest, read box by box on any topology."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from orchestrator.checkpoint.exchange import Peers
from orchestrator.checkpoint.folder import LATEST, MANIFEST, STATE, STEP_NAME, list_steps, read_latest, step_name
from orchestrator.checkpoint.hf_reader import read_json
from orchestrator.checkpoint.layout import assign
from orchestrator.checkpoint.manifest import FileRecord, Manifest
from orchestrator.checkpoint.tensor_file import TensorFiles
from orchestrator.errors import ConfigError, DataError
from parallel.shards import Box

# Files that a loader would take for weights, some of which may hold code: what the manifest does not name is not ours.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npz", ".npy")
WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".index.json", ".h5", ".msgpack", ".gguf")
LOOKS = 3  # at ``latest`` and what it names, while a run publishes the next one and takes away the last
ROOMS = ("adapter/", "model/")  # which peft and transformers open

Answer = TypeVar("Answer")


class CheckpointReader:
    """A ``TensorReader`` over one checkpoint folder; also gives its ``manifest`` and ``state``."""

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """Check the folder against its manifest: always presence and sizes of all files, with ``verify`` each sha256.

        Raises:
            DataError: a file is missing, truncated, damaged or foreign, or the manifest is of a later format.
        """
        self.folder = folder
        self.manifest = Manifest.read(folder / MANIFEST)
        _check_name(folder, self.manifest.step)
        self.warnings = check_extra(folder, self.manifest)
        for path, record in self.manifest.files.items():
            check_file(folder / path, record, verify=verify)
        self.state: Mapping[str, Any] = read_json(folder / STATE)
        files = {record.file for record in self.manifest.tensors.values()}
        self._files = {path: _open_file(folder / path, self.manifest.files[path]) for path in sorted(files)}

    @property
    def step(self) -> int:
        """Optimizer steps completed when it was saved."""
        return self.manifest.step

    def names(self, kind: str = "weight") -> tuple[str, ...]:
        """All logical tensors of a kind, sorted."""
        return tuple(sorted(name for name, other in self.manifest.tensors if other == kind))

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...]:
        """The whole logical shape. Raises KeyError when there is no such tensor."""
        return self.manifest.tensors[name, kind].tensor.shape

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """Read one box: a new CPU tensor of shape ``box.size`` in the stored type.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the box does not lie in it.
        """
        record = self.manifest.tensors[name, kind]
        return self._files[record.file].read(record.tensor.key, box)


def open_checkpoint(path: Path, step: int | None = None, *, verify: bool = False) -> CheckpointReader:
    """Open the checkpoint that ``latest`` names, or that of ``step``.

    Where there is no ``latest`` (a copy may have lost it), it is the newest one that is whole.

    Args:
        path: a run folder, its ``checkpoints`` folder, or the folder of one checkpoint.
        verify: hash every file (else presence and sizes are checked).
    Raises:
        ConfigError: there is no checkpoint there, or none of this step.
        DataError: the checkpoint is damaged; the message names file, expected and actual.
    """
    folder, faults = locate_checkpoint(path, step)
    try:
        reader = CheckpointReader(folder, verify=verify)
    except DataError:
        if folder.exists() or folder == path:
            raise
        return open_checkpoint(path, step, verify=verify)  # a run that trains has taken it away, and has a newer one
    reader.warnings = (*faults, *reader.warnings)
    return reader


def locate_checkpoint(path: Path, step: int | None = None) -> tuple[Path, tuple[str, ...]]:
    """The folder that :func:`open_checkpoint` opens, damaged or not, and what is to be said of the choice.

    Raises: as :func:`open_checkpoint`, but for damage of the checkpoint itself.
    """
    if STEP_NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        if not path.is_dir():
            raise ConfigError(f"there is no checkpoint {path}", "name a run folder or one of its checkpoints")
        return path, ()
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder", "name a run folder or one of its checkpoints")
    checkpoints = checkpoints_folder(path)
    if step is not None:
        steps = dict(list_steps(checkpoints))
    else:
        name, steps = _named(checkpoints)
        if name is None and steps:
            return _newest_whole(checkpoints, steps)
        if name is None:
            raise ConfigError(f"{checkpoints} has no {LATEST}: nothing was saved there", _hint_steps(steps))
        step = int(name.removeprefix("step-"))
        if step not in steps:
            raise DataError(f"{checkpoints / LATEST} names {name}, which is missing", _hint_steps(steps))
    if step not in steps:
        raise ConfigError(f"{checkpoints} has no {step_name(step)}", _hint_steps(steps))
    return steps[step], ()


def _newest_whole(checkpoints: Path, steps: Mapping[int, Path]) -> tuple[Path, tuple[str, ...]]:
    """The newest checkpoint that can be opened. Raises DataError, with what is wrong with each, where none can."""
    faults = [f"{checkpoints} has no {LATEST}"]
    for step in sorted(steps, reverse=True):
        try:
            CheckpointReader(steps[step])
        except DataError as error:
            faults.append(f"{step_name(step)} is not usable: {error}")
            continue
        return steps[step], (*faults, f"opened {steps[step]}")
    raise DataError("\n  ".join([*faults, "none is left"]), "restore one from a copy")


def find_latest_good(path: Path, *, peers: Peers | None = None) -> tuple[CheckpointReader | None, tuple[str, ...]]:
    """Open what ``latest`` names or, where that is damaged, the newest good one before it (then after it).

    Args:
        path: a run folder or its ``checkpoints`` folder.
        peers: all of them call it, open the same checkpoint, and hash a share of its files each.
    Returns:
        The reader and what the user should be told. The reader is None where nothing was ever saved.
    Raises:
        DataError: there are checkpoints, but none is good (or all are of a later format).
    """
    peers = peers or Peers(0, 1)
    checkpoints = checkpoints_folder(path)
    folders, notes = peers.gather(in_order(checkpoints))[0]
    messages = list(notes)
    for folder in folders:
        try:
            reader = _open_together(folder, peers)
        except DataError as error:
            if peers.size == 1 and not folder.exists():  # a run that trains has taken it away, and has a newer one
                return find_latest_good(path, peers=peers)
            messages.append(f"{folder.name.partition('.')[0]} is not usable: {error}")
            continue
        if messages:
            messages.append(f"going on from {reader.folder}")
        return reader, (*messages, *reader.warnings)
    if messages:
        raise DataError(
            f"no good checkpoint in {checkpoints}:\n  " + "\n  ".join(messages),
            "restore one from a copy, or start again with another run_dir=DIR",
        )
    return None, ()


def in_order(checkpoints: Path) -> tuple[list[Path], list[str]]:
    """The folders to try, best first: from ``latest`` down, then what is newer; and what is wrong with ``latest``."""
    notes = []
    try:
        name, steps = _named(checkpoints)
        if name is not None and name not in map(step_name, steps):
            notes.append(f"{checkpoints / LATEST} names {name}, which is missing")
    except DataError as error:
        notes.append(str(error))
        name, steps = None, dict(list_steps(checkpoints))
    named = max(steps, default=0) if name is None else int(name.removeprefix("step-"))
    order = sorted(steps, key=lambda step: (step > named, -step))
    return [steps[step] for step in order], notes


def _named(checkpoints: Path) -> tuple[str | None, dict[int, Path]]:
    """What ``latest`` names, and the folders of all steps, seen together. Raises DataError where it names no step."""
    for _ in range(LOOKS):
        name, steps = read_latest(checkpoints), dict(list_steps(checkpoints))
        if name is None or name in map(step_name, steps):
            break
    return name, steps


def _open_together(folder: Path, peers: Peers) -> CheckpointReader:
    """Open a checkpoint on every rank, its files hashed. Raises DataError on every rank where any finds a fault."""
    _agreed(peers, lambda: _hash_share(folder, peers))
    return _agreed(peers, lambda: CheckpointReader(folder))


def _hash_share(folder: Path, peers: Peers) -> None:
    files = sorted(Manifest.read(folder / MANIFEST).files.items())
    owners = assign([record.bytes for _, record in files], peers.size)
    for (name, record), owner in zip(files, owners, strict=True):
        if owner == peers.rank:
            check_file(folder / name, record, verify=True)


def _agreed(peers: Peers, action: Callable[[], Answer]) -> Answer:
    """What an action returns here, where it works on every rank; else every rank raises the same DataError."""
    problem = None
    try:
        answer = action()
    except DataError as error:
        problem = error
    peers.agree(None, problem)
    return answer


def checkpoints_folder(path: Path) -> Path:
    """The folder of checkpoints of a run folder, or ``path`` itself where that is one."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def check_file(path: Path, record: FileRecord, *, verify: bool) -> None:
    """Compare a file with its record.

    Raises:
        DataError: it is missing, has another size or (with ``verify``) another sha256.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise DataError(f"{path} is damaged: {size} bytes, {record.bytes} were written")
        if verify and (actual := hash_file(path)) != record.sha256:
            raise DataError(f"{path} is damaged: sha256 {actual}, {record.sha256} was written")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {record.bytes} bytes were written") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _open_file(path: Path, record: FileRecord) -> TensorFiles:
    """A file of the checkpoint; where its header is broken, the digests say it better than the header."""
    try:
        return TensorFiles([path])
    except DataError:
        check_file(path, record, verify=True)
        raise


def hash_file(path: Path) -> str:
    """The sha256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_name(folder: Path, step: int) -> None:
    """A folder that is named after another step would have a run go on from the wrong place."""
    if STEP_NAME.fullmatch(folder.name) and folder.name != step_name(step):
        raise DataError(f"{folder} holds step {step}", f"mv {folder} {folder.with_name(step_name(step))}")


def check_extra(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Refuse foreign pickles, and foreign weight files where others would open them; name other files in warnings."""
    warnings = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and path.is_dir():
            raise DataError(f"{path} is a link to a folder, which no checkpoint has", f"move it away: mv {path} /tmp")
        if path.is_dir() or name in manifest.files or name == MANIFEST:
            continue
        if path.name.lower().endswith(WEIGHT_SUFFIXES if name.startswith(ROOMS) else PICKLE_SUFFIXES):
            raise DataError(
                f"{path} was not written with this checkpoint: {len(manifest.files)} files were, it is none of them",
                f"move it away: mv {path} /tmp",
            )
        warnings.append(f"{path} was not written with this checkpoint")
    return tuple(warnings)


def _hint_steps(steps: Mapping[int, Path]) -> str:
    if not steps:
        return "name the run_dir of a run that has saved"
    return f"there are steps {', '.join(map(str, sorted(steps)))}"
