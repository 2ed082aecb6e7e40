"""What a run writes about its steps: metrics.jsonl always, TensorBoard or wandb on request, progress for the user."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from launch.environment import wandb_is_offline
from orchestrator.config.job import MetricsConfig
from orchestrator.errors import ConfigError
from orchestrator.progress import make_progress
from orchestrator.runs import write_whole


class Sink(Protocol):
    """Somewhere that steps are written to."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one step."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class Metrics:
    """All sinks of a run. Make it on the first rank only.

    Args:
        config: which sinks, and whether progress is shown.
        run_dir: the run folder.
        total_steps: the step that ends the run.
        first_step: the first step that will be logged: 1, or k + 1 when resuming after step k. Lines of that step
            and later ones, left by a run that was killed after its last checkpoint, are dropped.
        stream: where progress goes; None means standard error.
        peak_tokens_per_s: what ``mfu`` is a share of; 0 where it is not known.
    Raises:
        ConfigError: a package that a sink needs is not installed.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run_dir: Path,
        total_steps: int,
        first_step: int = 1,
        stream: TextIO | None = None,
        peak_tokens_per_s: float = 0.0,
    ) -> None:
        self._peak_tokens_per_s = peak_tokens_per_s
        stream = sys.stderr if stream is None else stream
        makers: dict[str, Callable[[], Sink]] = {
            "tensorboard": lambda: _TensorBoard(run_dir, first_step),
            "wandb": lambda: _Wandb(config.project, run_dir, stream),
        }
        self._sinks: list[Sink] = [_Jsonl(run_dir / "metrics.jsonl", first_step)]
        self._sinks += [makers[name]() for name in dict.fromkeys(config.sinks) if name in makers]
        if config.progress:
            self._sinks.append(make_progress(stream, total_steps, first_step))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one optimizer step to every sink.

        Args:
            step: optimizer steps completed, counted from 1.
            values: ``loss``, ``grad_norm``, ``learning_rate``, ``tokens`` (of this step, over all ranks), ``step_s``,
                and whatever else there is. ``tokens_per_s`` is computed where it is missing, and ``mfu`` where the
            devices' peak is known.
        """
        whole = {name: value for name, value in values.items() if name != "step"}
        if "tokens_per_s" not in whole and whole.get("step_s"):
            whole["tokens_per_s"] = whole.get("tokens", 0) / whole["step_s"]
        if self._peak_tokens_per_s and "tokens_per_s" in whole:
            whole["mfu"] = whole["tokens_per_s"] / self._peak_tokens_per_s
        for sink in self._sinks:
            sink.log(step, whole)

    def close(self) -> None:
        """Finish all sinks."""
        for sink in self._sinks:
            sink.close()


class _Jsonl:
    """One JSON object per line and step, flushed at once; a step is there once, whatever was killed and resumed."""

    def __init__(self, file: Path, first_step: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _is_before(line, first_step)]
            write_whole(file, "".join(f"{line}\n" for line in kept))
        self._stream = file.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, "time": round(time.time(), 3)}
        line |= {name: jsonable(value) for name, value in values.items()}
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _is_before(line: str, first_step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) < first_step
    except (ValueError, KeyError, TypeError):
        return False  # half a line


def jsonable(value: Any) -> Any:
    """JSON knows no nan and no infinity: null stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _TensorBoard:
    def __init__(self, run_dir: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"metrics.sinks has tensorboard, but it cannot be imported: {error}",
                "pip install 'isotrain[tensorboard]'",
            ) from error
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, run_dir: Path, stream: TextIO) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"metrics.sinks has wandb, but it cannot be imported: {error}", "pip install 'isotrain[wandb]'"
            ) from error
        offline = wandb_is_offline()
        if offline:
            print(f"wandb has no API key: it writes to {run_dir / 'wandb'} (later: wandb sync)", file=stream)
        self._run: Any = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
