"""From a job and its plan to an engine on this rank: the one place that wires model, adapter and optimizer together."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.checkpoint.adapter import OURS, adapter_config, lora_pairs, saved_tensors
from orchestrator.checkpoint.experts import common_name, loadable_config
from orchestrator.checkpoint.hf_reader import AdapterReader, HfReader
from orchestrator.config.job import JobConfig, TunerConfig, galore_spec
from orchestrator.errors import ConfigError
from orchestrator.models import model_spec, resolve_model
from orchestrator.planning.plan import Plan
from orchestrator.planning.tuning import beyond_peft
from parallel.engine import AdamSpec, Engine, EngineSpec
from parallel.lora_spec import LoraSpec
from parallel.names import EMBEDDING, HEAD, adaptable_modules, resolve_targets
from parallel.selection import frozen_weights, rate_ratios, saved_weights, weight_shapes
from parallel.specs import ModelSpec

if TYPE_CHECKING:
    from parallel.engines.megatron_base import SharedBase
    from parallel.groups import Groups

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json"),
    *("merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


@dataclass(frozen=True)
class Room:
    """What lies beside the weights in a checkpoint: ``adapter/`` for LoRA, ``model/`` for full tuning."""

    name: str
    files: dict[str, bytes | Path]

    def read(self) -> Room:
        """The same with the files' contents, so that saves do not depend on where they came from."""
        contents = {name: file.read_bytes() if isinstance(file, Path) else file for name, file in self.files.items()}
        return Room(self.name, {**contents})


def lora_spec(tuner: TunerConfig, model: ModelSpec) -> LoraSpec | None:
    """The adapter that a tuner asks for; None for full tuning.

    Raises:
        TargetError: ``tuner.targets`` names nothing in this model.
    """
    if tuner.name == "full":
        return None
    return LoraSpec(
        r=tuner.r,
        alpha=tuner.alpha,
        dropout=tuner.dropout,
        rslora=tuner.rslora,
        targets=resolve_targets(tuner.targets, model),
        dora=tuner.dora,
        lr_ratio=tuner.loraplus_lr_ratio,
        init=tuner.init,
        saved=saved_weights(tuner.modules_to_save, model),
    )


def balancing_loss(job: JobConfig, model: ModelSpec) -> float:
    """The coefficient of the routers' balancing loss: the job's or, where it has none, the model's."""
    asked = job.experts.balancing_loss
    return model.router_aux_loss if asked is None else asked


def engine_spec(job: JobConfig, plan: Plan, model: ModelSpec) -> EngineSpec:
    """What the engine needs of a job and its plan."""
    optimizer = job.optimizer
    return EngineSpec(
        model=model,
        stages=plan.stages,
        lora=lora_spec(job.tuner, model),
        adam=AdamSpec(
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip_norm=optimizer.clip_norm,
            distributed=plan.distributed,
        ),
        vpp=plan.vpp,
        sp=plan.sp,
        precision=plan.precision,
        recompute=plan.recompute,
        seed=job.seed,
        balancing_loss=balancing_loss(job, model),
        balancing_over=job.experts.balancing_over,
        capacity_factor=job.experts.capacity_factor,
        bias_rate=job.experts.bias_rate,
        sequence_tokens=-(-plan.sequence_tokens // plan.length_multiple) * plan.length_multiple,
        cp_comm=plan.cp_comm,
        quantise=job.tuner.quantise,
        frozen=frozen_weights(job.tuner.freeze, model),
        lr_ratios=rate_ratios(optimizer.lr_ratios, model),
        galore=galore_spec(optimizer),
    )


def open_engine(job: JobConfig, plan: Plan, groups: Groups, shared: SharedBase | None = None) -> Engine:
    """Build the engine of this rank with its base weights and a new adapter.

    Args:
        shared: the frozen weights that engines of several runs have in common.
    """
    from parallel.engines.megatron import MegatronEngine

    model, base = model_spec(job.model), None
    if job.model.weights == "load":
        folder = resolve_model(job.model.path)
        base = HfReader(folder)
        base.check(folder, weight_shapes(model))
    return MegatronEngine(engine_spec(job, plan, model), groups, base, shared)


def load_adapter(job: JobConfig, engine: Engine) -> None:
    """Start from the adapter of ``tuner.path``, where one is given; a resumed run has no need of it."""
    if job.tuner.path:
        engine.load(AdapterReader(Path(job.tuner.path).expanduser()), moments=False)


def room(job: JobConfig, model: ModelSpec) -> Room:
    """The files beside the weights, so that ``peft`` or ``transformers`` load the folder as it is."""
    if job.tuner.name != "full":
        leaves = job.tuner.targets
        if leaves == "all-linear" or (isinstance(leaves, str) and not _is_expression(leaves, model)):
            leaves = sorted({target.rpartition(".")[2] for target in resolve_targets(leaves, model)})
        config = adapter_config(job.tuner, leaves, job.model.path or "", model.tied_embeddings)
        if model.is_moe:
            targets = resolve_targets(job.tuner.targets, model)
            config = loadable_config(config, targets)
            config |= {"peft_type": OURS} if beyond_peft(job.tuner, targets, model) else {}
        return Room("adapter", {"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode()})
    if job.model.weights == "random" and job.model.config is not None:
        return Room("model", {"config.json": (json.dumps(job.model.config, indent=2) + "\n").encode()})
    folder = resolve_model(job.model.path)
    present = [name for name in ("config.json", *TOKENIZER_FILES) if (folder / name).is_file()]
    return Room("model", {name: folder / name for name in present})


def _is_expression(targets: str, model: ModelSpec) -> bool:
    return not any(f".{module}".endswith(f".{targets}") for module in adaptable_modules(model))


def check_adapter(job: JobConfig, model: ModelSpec) -> None:
    """Find out before anything is started that ``tuner.path`` is an adapter of the shape that the job asks for.

    Raises:
        ConfigError: it is no plain LoRA, or of another rank, scaling or set of modules; the hint is what to set.
    """
    if not job.tuner.path:
        return
    if job.tuner.name == "full":
        raise ConfigError("tuner.path is an adapter, but tuner=full trains the model itself", "tuner=lora")
    folder = Path(job.tuner.path).expanduser()
    reader = AdapterReader(folder)
    config, pairs = reader.config, lora_pairs(reader, folder)
    keys = {"r": "tuner.r", "lora_alpha": "tuner.alpha", "use_rslora": "tuner.rslora", "use_dora": "tuner.dora"}
    wanted = {name: getattr(job.tuner, key.removeprefix("tuner.")) for name, key in keys.items()}
    other = {name: config.get(name, False) for name, value in wanted.items() if config.get(name, False) != value}
    if other:
        there = ", ".join(
            f"{keys[name]}={wanted[name]} but {name} {value} in the adapter" for name, value in other.items()
        )
        raise ConfigError(
            f"tuner.path={job.tuner.path} does not fit the job: {there}",
            " ".join(f"{keys[name]}={str(value).lower()}" for name, value in other.items()),
        )
    _check_modules(job, model, {_common_module(name.removesuffix(".weight")) for name in pairs})
    _check_saved(job, model, set(saved_tensors(reader, folder)))
    scale = LoraSpec(job.tuner.r, job.tuner.alpha, rslora=job.tuner.rslora).scale
    for pair in pairs.values():  # rank_pattern and alpha_pattern give modules their own
        rank = reader.shape(pair.a)[0]
        if rank != job.tuner.r or not math.isclose(pair.scale, scale):
            raise ConfigError(
                f"tuner.path={job.tuner.path}: {pair.base} has rank {rank} and scale {pair.scale:g}, but the job has "
                f"rank {job.tuner.r} and scale {scale:g} everywhere",
                "merge the adapter into the base with PEFT (merge_and_unload), and start from that: model.path=MERGED",
            )


def _check_saved(job: JobConfig, model: ModelSpec, there: set[str]) -> None:
    """Where the head is the embedding, PEFT writes it twice if they were trained as one."""
    wanted = saved_weights(job.tuner.modules_to_save, model)
    if model.tied_embeddings and EMBEDDING in there and HEAD not in there:
        raise ConfigError(
            f"tuner.path={job.tuner.path} has trained the embedding apart from the head, which are one in this model",
            "train it in PEFT with ensure_weight_tying=True",
        )
    if there - ({HEAD} if model.tied_embeddings else set()) != wanted:
        leaves = ",".join(sorted({name.split(".")[-2] for name in there}))
        raise ConfigError(
            f"tuner.path={job.tuner.path} holds {len(there)} whole weights, but "
            f"tuner.modules_to_save={job.tuner.modules_to_save} names {len(wanted)}",
            f"tuner.modules_to_save=[{leaves}]",
        )


def _common_module(path: str) -> str:
    return common_name(f"{path}.weight").removesuffix(".weight")


def _check_modules(job: JobConfig, model: ModelSpec, there: set[str]) -> None:
    wanted = {_common_module(name) for name in resolve_targets(job.tuner.targets, model)}
    if there != wanted:
        missing, extra = sorted(wanted - there), sorted(there - wanted)
        words = [f"{len(missing)} that it lacks, first {missing[0]}"] if missing else []
        words += [f"{len(extra)} more, first {extra[0]}"] if extra else []
        leaves = ",".join(sorted({name.rpartition(".")[2] for name in there}))
        raise ConfigError(
            f"tuner.path={job.tuner.path} adapts other modules than tuner.targets={job.tuner.targets}: "
            + " and ".join(words),
            f"tuner.targets=[{leaves}]",
        )
