"""Folders of other tools made into folders that everything here reads."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import ConfigError


def convert(folder: Path, out: Path, *, allow_pickle: bool = False) -> str:
    """Write a Hugging Face or PEFT folder in safetensors from one that other tools wrote, bit for bit.

    Args:
        folder: a model's or an adapter's folder with pickled weights (``.bin``); only read.
        out: a new folder.
        allow_pickle: open pickles, through torch's weights-only unpickler.
    Returns:
        What the folder was.
    Raises:
        ConfigError: there is nothing to convert, pickles are not allowed, or ``out`` is taken.
        DataError: the folder is damaged, or a pickle holds anything but tensors.
    """
    from orchestrator.checkpoint.pickles import convert_pickles, find_pickled

    folder = folder.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder", "check the path")
    pickled = find_pickled(folder)
    if not allow_pickle:
        raise ConfigError(
            f"{pickled.files[0]} is a pickle, which is opened only when you say so (no code in it is run)",
            f"isotrain convert {folder} {out} --allow-pickle",
        )
    convert_pickles(folder, out)
    return "pickles"
