"""``isotrain export`` as functions: what a run has come to, in the formats of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.checkpoint.folder import MANIFEST
from orchestrator.config.building import read_job
from orchestrator.errors import ConfigError, DataError
from orchestrator.models import resolve_model

Say = Callable[[str], None]


def export(path: Path, to: str, out: Path, say: Say = lambda text: None) -> Path:
    """Export a run's newest checkpoint, or one checkpoint, as a PEFT adapter, as a merged model or for megatron-core.

    Args:
        path: a run folder or a checkpoint; for ``torch_dist`` a model's folder, too.
        to: ``peft``, ``merged`` or ``torch_dist``.
        out: a new folder.
        say: tells the user what was left out, or is strange about the checkpoint, a line at a time.
    Raises:
        ConfigError: there is no checkpoint, or ``out`` is taken. DataError: the checkpoint is damaged.
    """
    from orchestrator.checkpoint.export import export_adapter, export_merged
    from orchestrator.checkpoint.load import open_checkpoint
    from orchestrator.checkpoint.megatron_weights import export_checkpoint, export_torch_dist

    if to == "torch_dist" and (path.expanduser() / "config.json").is_file():
        export_torch_dist(path.expanduser(), out)
        say("weights only: a model's folder has no optimizer state")
        return out
    try:
        reader = open_checkpoint(path.expanduser(), verify=True)
    except DataError as error:
        raise _with_older(error, path, to, out) from error
    for line in reader.warnings:
        say(line)
    checkpoint = reader.folder
    if to == "peft":
        export_adapter(checkpoint, out)
    elif to == "torch_dist":
        left_out = export_checkpoint(checkpoint, out)
        say(f"weights only: {left_out}" if left_out else "weights and the optimizer's state")
    else:
        export_merged(checkpoint, base_folder(checkpoint), out)
    return out


def export_to_url(path: Path, to: str, url: str, say: Say = lambda text: None) -> None:
    """:func:`export` to a URL: made in a temporary folder of this machine, sent, and read back there.

    Raises:
        ConfigError, DataError, ResourceError: as export, or the place cannot be used, does not answer, or keeps
            something else than it is given.
    """
    import tempfile

    from orchestrator.storage import upload

    with tempfile.TemporaryDirectory() as folder:
        upload(export(path, to, Path(folder) / "export", say), url)


def _with_older(error: DataError, path: Path, to: str, out: Path) -> DataError:
    """The same error, with the newest checkpoint that is whole as its hint."""
    from orchestrator.checkpoint.load import find_latest_good

    folder = path.expanduser() / "checkpoints"
    good = find_latest_good(folder)[0] if folder.is_dir() and not error.hint else None
    return DataError(str(error), f"isotrain export {good.folder} --to {to} {out}") if good else error


def base_folder(checkpoint: Path) -> Path:
    """The folder of the model that a checkpoint's adapter belongs to, as the run's job or the adapter names it.

    Raises:
        ConfigError: neither names one, or it is not on this machine.
        DataError: the weights there are not those that the adapter was trained on.
    """
    from orchestrator.checkpoint.base import check_base

    base = _named_base(checkpoint)
    if (checkpoint / MANIFEST).is_file() and (checkpoint / "adapter").is_dir():
        check_base(checkpoint, base)
    return base


def _named_base(checkpoint: Path) -> Path:
    import json

    run_dir = checkpoint.absolute().parent.parent
    if (run_dir / "job.yaml").is_file():
        return resolve_model(read_job(run_dir).model.path)
    for folder in (checkpoint / "adapter", checkpoint):
        if (folder / "adapter_config.json").is_file():
            return resolve_model(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    raise ConfigError(f"{checkpoint} does not say which model it belongs to", "name the run folder instead")
