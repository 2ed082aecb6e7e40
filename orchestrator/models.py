"""Where a model's files are on this machine: a folder, isotrain's cache or the Hugging Face cache.

Nothing here touches the network unless the job says ``model.download=true``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from launch.environment import hugging_face_cache, isotrain_cache
from orchestrator.config.job import ModelConfig
from orchestrator.errors import ConfigError, IsotrainError
from parallel.families import read_model
from parallel.specs import ModelSpec, read_hf_config

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")  # old ids have no organisation


def cached_model_folder(hub_id: str) -> Path:
    """The folder of isotrain's cache that belongs to a hub id, whether or not it exists.

    Example:
        >>> cached_model_folder("org/tiny").name
        'org--tiny'
    """
    return isotrain_cache() / "models" / hub_id.replace("/", "--")


def resolve_model(path: str | None, download: bool = False) -> Path:
    """Find a model's folder.

    Args:
        path: a folder with a ``config.json``, or a hub id (``org/name``) that is in isotrain's or Hugging Face's cache.
        download: fetch a hub id that is in neither cache: the only network access there is.
    Returns:
        A folder that holds at least ``config.json``.
    Raises:
        ConfigError: no path was given, the folder is no model, or the id is in no cache; says what was searched.
    """
    if not path:
        raise ConfigError("model.path is not set", "model=smollm2_135m  or  model.path=FOLDER")
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder.resolve()
        raise ConfigError(
            f"model.path={path} is a folder without config.json, so it is no Hugging Face model", "model.path=FOLDER"
        )
    if not HUB_ID.fullmatch(path):
        raise ConfigError(f"model.path={path}: no such folder", "model.path=FOLDER")
    found = _cached(path)
    if found is None and download:
        return _download(path)
    if found is None:
        raise _not_found(path)
    return found


def model_spec(model: ModelConfig) -> ModelSpec:
    """The model's shape: from its folder, else from the keys in ``model.config`` (so that a plan needs no files).

    With ``model.weights=random`` the given keys come first, because they may describe a model that is nowhere.

    Raises:
        ConfigError: neither is there.
        SpecError: the config describes no model that we know.
    """
    if model.config is not None and (model.weights == "random" or not model.path):
        return read_model(model.config)
    try:
        return read_model(read_hf_config(resolve_model(model.path, model.download)))
    except ConfigError:
        if model.config is None or not HUB_ID.fullmatch(model.path or ""):
            raise  # a folder that is not there is a mistake, a hub id that is in no cache yet is none
        return read_model(model.config)


def _cached(hub_id: str) -> Path | None:
    for folder in (cached_model_folder(hub_id), _snapshot(hub_id)):
        if folder is not None and (folder / "config.json").is_file():
            return folder
    return None


def _snapshot(hub_id: str) -> Path | None:
    """The snapshot that ``main`` names in the Hugging Face cache, else the newest one with a config."""
    repository = hugging_face_cache() / ("models--" + hub_id.replace("/", "--"))
    main = repository / "refs" / "main"
    if main.is_file():
        named = repository / "snapshots" / main.read_text().strip()
        if (named / "config.json").is_file():
            return named
    snapshots = [config.parent for config in repository.glob("snapshots/*/config.json")]
    return max(snapshots, key=lambda folder: folder.stat().st_mtime, default=None)


def _not_found(hub_id: str) -> ConfigError:
    hints = ["model.path=FOLDER", "model.download=true"]
    from orchestrator.smollm2 import HUB_ID as SMOLLM2

    if hub_id == SMOLLM2:
        hints.insert(0, "make model (or: python -m orchestrator.models smollm2)")
    return ConfigError(
        f"model.path={hub_id} is no folder here and is in no local cache; searched:\n"
        f"  {Path(hub_id).absolute()}\n"
        f"  {cached_model_folder(hub_id)}\n"
        f"  {hugging_face_cache() / ('models--' + hub_id.replace('/', '--'))}",
        "  or  ".join(hints),
    )


def _download(hub_id: str) -> Path:
    """Fetch what training needs (config, tokenizer, safetensors) into the Hugging Face cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.path={hub_id} could not be downloaded: {first_line}", "model.path=FOLDER") from error
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"model.path={hub_id} was downloaded but has no config.json", "model.path=FOLDER")
    return Path(folder)


def main(arguments: list[str]) -> int:
    """``python -m orchestrator.models smollm2``: make the demo's model in the cache; print its folder."""
    if arguments != ["smollm2"]:
        print("usage: python -m orchestrator.models smollm2", file=sys.stderr)
        return int(ConfigError.code)
    from orchestrator.smollm2 import make_model

    try:
        print(make_model())
    except IsotrainError as error:
        print(error.render(), file=sys.stderr)
        return int(error.code)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
