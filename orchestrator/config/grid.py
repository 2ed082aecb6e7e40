"""The points of a sweep, from words in Hydra's own grammar: ``a,b``, ``choice(a,b)``, ``range(1,4)``, ``glob(*)``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.loading import config_root, parse_words
from orchestrator.errors import ConfigError

MOST_POINTS = 1000  # every point is planned before anything starts


@dataclass(frozen=True)
class Grid:
    """``common``: the words of every point. ``points``: the words of each that differ, the last key fastest."""

    common: tuple[str, ...]
    points: tuple[tuple[str, ...], ...]


def grid(words: Sequence[str]) -> Grid:
    """All combinations of the values of words that have several, as Hydra's BasicSweeper makes them.

    A key that is given twice counts once, as it was given last; equal points are one.

    Raises:
        ConfigError: a word is no override, has values that cannot be listed, or there are none or too many points.
    Example:
        >>> grid(["steps=5", "tuner.r=8,16", "seed=range(0,2)"]).points
        (('tuner.r=8', 'seed=0'), ('tuner.r=8', 'seed=1'), ('tuner.r=16', 'seed=0'), ('tuner.r=16', 'seed=1'))
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    values: dict[str, list[str]] = {}
    swept: dict[str, bool] = {}
    with initialize_config_dir(config_dir=str(config_root()), version_base="1.3", job_name="isotrain"):
        for override in parse_words(words):
            override.config_loader = GlobalHydra.instance().config_loader()  # glob(...) asks it for a group's choices
            key, typed = override.get_key_element(), override.input_line
            swept[key] = override.is_sweep_override()
            if swept[key] and not override.is_discrete_sweep():
                raise ConfigError(
                    f"{typed}: a grid cannot list the values of an interval",
                    f"'{key}=choice(...)'   or   isotrain train --multirun hydra/sweeper=optuna '{typed}'",
                )
            values[key] = [f"{key}={text}" for text in override.sweep_string_iterator()] if swept[key] else [typed]
            if not values[key]:
                raise ConfigError(f"{typed} has no values", "as in: tuner.r=8,16  'seed=range(0,3)'  'tuner=glob(*)'")
    axes = {key: values[key] for key in values if swept[key]}
    if not axes:
        raise ConfigError("nothing is swept: no word has several values", "tuner.r=8,16   or   isotrain train ...")
    count = math.prod(map(len, axes.values()))
    if count > MOST_POINTS:
        sizes = " x ".join(f"{len(values)} of {key}" for key, values in axes.items())
        raise ConfigError(f"{sizes} are {count} points; at most {MOST_POINTS} are planned at once", "fewer values")
    common = [values[key][0] for key in values if not swept[key]]
    return Grid(tuple(common), tuple(dict.fromkeys(itertools.product(*axes.values()))))
