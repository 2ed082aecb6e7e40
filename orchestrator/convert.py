"""Folders of other tools made into folders that everything here reads."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.models import resolve_model


def convert(
    folder: Path, out: Path, *, allow_pickle: bool = False, model: str | None = None, moments: bool = False
) -> str:
    """Write a Hugging Face or PEFT folder in safetensors from one that other tools wrote, bit for bit.

    Args:
        folder: a model's or an adapter's folder with pickled weights (``.bin``), or a ``torch_dist`` checkpoint of
            megatron-core (or the folder where Megatron-LM has saved some); only read.
        out: a new folder.
        allow_pickle: open pickled weights, through torch's weights-only unpickler.
        model: for a torch_dist checkpoint, which does not say what model it is: a folder with its ``config.json`` (and
            tokenizer), or a hub id in a cache.
        moments: of a torch_dist checkpoint, the optimizer's state, too; ``out`` is then a run folder to go on in.
    Returns:
        What the folder was.
    Raises:
        ConfigError: there is nothing to convert, pickles are not allowed, the checkpoint is of another model or has no
            moments that can go on here, or ``out`` is taken.
        DataError: the folder is damaged, or a pickle holds anything but tensors.
    """
    from orchestrator.checkpoint.megatron_run import import_run
    from orchestrator.checkpoint.megatron_weights import checkpoint_folder, import_torch_dist
    from orchestrator.checkpoint.pickles import convert_pickles, find_pickled
    from orchestrator.checkpoint.torch_dist import METADATA

    folder = folder.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder", "check the path")
    if (checkpoint_folder(folder) / METADATA).exists():
        if model is None:
            raise ConfigError(
                f"{folder} is a torch_dist checkpoint, which does not say what model it is",
                f"isotrain convert {folder} {out} --model FOLDER  (one with its config.json)",
            )
        try:
            config_folder = resolve_model(model)
        except ConfigError as error:
            raise ConfigError(str(error).replace("model.path=", "--model ", 1), "--model FOLDER") from error
        (import_run if moments else import_torch_dist)(folder, config_folder, out)
        return "torch_dist"
    if moments:
        raise ConfigError(f"{folder} is no torch_dist checkpoint, and others hold no moments", "leave --moments away")
    pickled = find_pickled(folder)
    if not allow_pickle:
        raise ConfigError(
            f"{pickled.files[0]} is a pickle, which is opened only when you say so (no code in it is run)",
            f"isotrain convert {folder} {out} --allow-pickle",
        )
    convert_pickles(folder, out)
    return "pickles"
