"""Runs that are saved, exported and loaded again: what our engine says, to be compared with what peft says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import runs
from tests.helpers.runs import Run

TOKENS = [[5, 9, 3, 77, 1, 42, 8, 8, 30, 11, 64, 2], [17, 4, 99, 23, 6, 51, 70, 2, 3, 12, 45, 90]]


def tuner_of(run: Run) -> Any:
    """The job's tuner that makes this run's adapter."""
    from orchestrator.config.job import TunerConfig

    targets = list(run.targets) if isinstance(run.targets, tuple) else run.targets
    return TunerConfig(
        r=4,
        alpha=8.0,
        dropout=run.dropout,
        rslora=run.rslora,
        dora=run.dora,
        init=run.init,
        targets=targets,
        modules_to_save=list(run.modules_to_save),
    )


def job_of(run: Run, base_folder: str) -> Any:
    """A job whose checkpoints carry what this run's would."""
    from orchestrator.config.job import JobConfig, ModelConfig

    return JobConfig(model=ModelConfig(path=base_folder), tuner=tuner_of(run))


def train_and_save(run: Run, base_folder: str, checkpoints: str) -> Any:
    """Train, save a checkpoint after the last step, and return the logits of TOKENS (last stage)."""
    from orchestrator.assemble import room
    from orchestrator.checkpoint.publish import Contents
    from orchestrator.checkpoint.save import save

    engine, groups = runs.open_engine(run, base_folder)
    if engine is None:
        return None
    for step in range(run.steps):
        engine.train_step(runs.microbatches(run, step, groups.coordinate("dp")), run.rate(step))
    beside = room(job_of(run, base_folder), run.model)
    about = {"quantise": run.quantise, "precision": run.precision}
    contents = Contents(beside.name, {"step": run.steps}, beside.files, about)
    save(Path(checkpoints), run.steps, engine.shards(), contents)
    return _logits(engine, groups)


def logits_of_adapter(run: Run, base_folder: str, adapter: str) -> Any:
    """The logits of TOKENS by our engine with an adapter folder of PEFT (last stage)."""
    from orchestrator.checkpoint.hf_reader import AdapterReader

    engine, groups = runs.open_engine(run, base_folder)
    engine.load(AdapterReader(Path(adapter)), moments=False)
    return _logits(engine, groups)


def go_on(run: Run, base_folder: str, checkpoint: str, completed: int) -> tuple[list[float], list[tuple[Any, ...]]]:
    """Load a checkpoint and train to the end of the run; losses and this rank's pieces."""
    from orchestrator.checkpoint.load import CheckpointReader

    engine, groups = runs.open_engine(run, base_folder)
    engine.load(CheckpointReader(Path(checkpoint)), moments=True)
    engine.set_optimizer_steps(completed)
    losses = [
        engine.train_step(runs.microbatches(run, step, groups.coordinate("dp")), run.rate(step)).loss
        for step in range(completed, run.steps)
    ]
    state = runs.pieces(engine)
    groups.close()
    return losses, state


def peft_logits(base_folder: Path, adapter: Path) -> torch.Tensor:
    """The logits of TOKENS by transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor(TOKENS)).logits
    return logits


def model_logits(folder: Path) -> torch.Tensor:
    """The logits of TOKENS by transformers alone."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            torch.tensor(TOKENS)
        ).logits
    return logits


def config_of(adapter: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder."""
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return config


def _logits(engine: Any, groups: Any) -> Any:
    value = engine.logits(torch.tensor(TOKENS))
    dist.barrier(group=groups.by_name["world"])
    groups.close()
    return None if value is None else value.cpu().numpy()


def hf_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All logical tensors of a Hugging Face folder."""
    from orchestrator.checkpoint.hf_reader import HfReader
    from parallel.shards import Box

    reader = HfReader(folder)
    return {name: reader.read(name, "weight", Box.whole(reader.shape(name))) for name in reader.names}
