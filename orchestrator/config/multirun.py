"""Hydra's own sweepers over jobs: they choose the points, and hydra_plugins/isotrain_launcher.py has them trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.config.loading import config_root, hydra_words, parse_words
from orchestrator.errors import ConfigError

PACKAGED = {"optuna": "hydra-optuna-sweeper", "ax": "hydra-ax-sweeper", "nevergrad": "hydra-nevergrad-sweeper"}

RunBatch = Callable[[Sequence[tuple[str, ...]], int | None, str], Sequence[float | Exception]]
"""Trains a batch of points (their words), so many at a time, and gives back the metric of each, or why it has none."""


def is_hydras(word: str) -> bool:
    """Whether a word is a setting of Hydra's own.

    Example:
        >>> is_hydras("hydra/sweeper=optuna"), is_hydras("hydra.sweeper.n_trials=8"), is_hydras("seed=1,2")
        (True, True, False)
    """
    return word.lstrip("+~").startswith(("hydra/", "hydra."))


def common_words(words: Sequence[str]) -> list[str]:
    """The words of a job that are the same at all points: those with one value.

    Raises:
        ConfigError: a word is no override.
    """
    parsed = parse_words([word for word in words if not is_hydras(word)])
    return [one.input_line for one in parsed if not one.is_sweep_override()]


def multirun(words: Sequence[str], folder: Path, run_batch: RunBatch) -> None:
    """Let the sweeper that the words configure (Hydra's BasicSweeper unless they do) choose points until it is done.

    Args:
        words: of the job, with several values for some; ``hydra/sweeper=``, ``hydra.sweeper.KEY=``,
            ``hydra.launcher.jobs=`` and ``hydra.launcher.best=`` among them.
        folder: where the sweeper may leave its own files.
        run_batch: called for each batch of points.
    Raises:
        ConfigError: a word is no override, a sweeper is not there, or is set up in a way that it refuses.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    asked = [word for word in words if is_hydras(word)]
    ours = ["hydra/launcher=isotrain", f"hydra.sweep.dir='{folder}'", "hydra.output_subdir=null"]
    job = hydra_words([word for word in words if not is_hydras(word)])
    with initialize_config_dir(config_dir=str(config_root()), version_base="1.3", job_name="isotrain"):
        hydra = GlobalHydra.instance().hydra
    try:  # out there, because jobs are composed meanwhile, and Hydra's state is global
        hydra.multirun("job", task_function=run_batch, overrides=[*ours, *asked, *job], with_log_configuration=False)
    except MissingConfigException as error:
        raise _not_there(str(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"Hydra refuses the sweep: {str(error).splitlines()[0]}", "see docs/sweeps.md") from error


def _not_there(said: str) -> ConfigError:
    """The sweeper (or another plugin) that Hydra has not found, with the line that installs it."""
    first = said.splitlines()[0]
    package = next((package for name, package in PACKAGED.items() if f"hydra/sweeper/{name}'" in first), None)
    hint = f"pip install {package}" if package else "hydra/sweeper=basic"
    return ConfigError(f"Hydra does not find a plugin: {first}", hint)
