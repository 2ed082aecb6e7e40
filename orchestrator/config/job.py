"""What the user asks for: one frozen value, built from composed configs, the same on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from parallel.galore_spec import GaloreSpec


@dataclass(frozen=True)
class ModelConfig:
    """``path``: a Hugging Face folder, or a hub id that is in a local cache (see ``orchestrator.models``).

    ``weights``: ``load`` or ``random``. ``config``: the model's config.json keys, for planning without the files.
    """

    path: str | None = None
    weights: str = "load"
    download: bool = False
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class SlurmConfig:
    """What ``isotrain submit`` asks of Slurm beside nodes and GPUs; null: the option is left out. docs/launch.md.

    ``prologue``: what makes ``isotrain`` known on a node: [] (the submitter's PATH), [module, NAME, ...],
    [venv, FOLDER], [conda, NAME], or the ranks' container: [apptainer, IMAGE], [pyxis, IMAGE]. ``secrets``: a file of
    NAME=VALUE lines for the ranks' environment, mode 0600. ``requeue``: go on in a new allocation after preemption,
    the time limit or a lost node. ``signal_s``: how long before the time limit a run stops and saves.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str | None = None
    gres: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    mail_user: str | None = None
    mail_type: str | None = None
    array: str | None = None
    dependency: str | None = None
    exclusive: bool = True
    extra: list[str] = field(default_factory=list)
    prologue: list[str] = field(default_factory=list)
    secrets: str | None = None
    requeue: bool = True
    signal_s: int = 120


AUTO = "auto"
"""The name of the cluster that is found out."""


@dataclass(frozen=True)
class ClusterConfig:
    """``gpus_per_node`` counts ranks per node, also on a CPU. ``memory_gib`` is per rank.

    ``nodes``: a number, or a range such as ``2-8``, of which the most is kept here and the fewest in ``fewest_nodes``
    (None: no fewer); such a run is planned anew for the nodes of each start.

    Of the cluster named ``auto``, 0 and the device ``auto`` are found out (``orchestrator.detection.cluster``).

    ``gpu``: the kind in the catalogue of devices (``orchestrator/planning/devices.yaml``); None: an H100 on cuda.
    ``profile``: a file of ``isotrain calibrate``; None: this host's, where it has one and the plan is for it.
    """

    name: str = "laptop"
    nodes: int = 1
    gpus_per_node: int = 4
    device: str = "cpu"
    memory_gib: float = 4.0
    gpu: str | None = None
    profile: str | None = None
    fewest_nodes: int | None = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class TopologyConfig:
    """Sizes of the axes; None means: the plan derives it.

    ``cp_comm``: how ranks that share a row see each other's tokens, ``ring`` or ``ulysses``.
    """

    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    dp: int | None = None
    sp: bool | None = None
    cp_comm: str | None = None


@dataclass(frozen=True)
class MemoryConfig:
    """``recompute``: none, selective or full; None: the least that fits."""

    recompute: str | None = None


@dataclass(frozen=True)
class EngineConfig:
    """``name``: which engine runs the step."""

    name: str = "megatron"


@dataclass(frozen=True)
class BatchConfig:
    """``global_sequences`` per optimizer step over all dp ranks; ``micro_sequences`` per forward on one dp rank; None:
    the plan derives it; ``auto``: and the run finds a better one (``orchestrator.micro_batches``).

    ``sequence_tokens``: longest row; longer samples are cut there and counted.
    """

    global_sequences: int = 8
    micro_sequences: int | str | None = None
    sequence_tokens: int = 512

    @property
    def micro(self) -> int | None:
        """The size that was asked for; None: it is open."""
        return self.micro_sequences if isinstance(self.micro_sequences, int) else None


@dataclass(frozen=True)
class DataConfig:
    """``on_bad_row``: ``error`` or ``skip`` (skipped rows are counted and said)."""

    path: str | None = None
    on_bad_row: str = "error"


@dataclass(frozen=True)
class ObjectiveConfig:
    """``name``: sft; dpo, orpo and simpo are planned, not trained.

    ``train_on``: ``assistant`` turns, the ``last`` of them, or ``all``.
    """

    name: str = "sft"
    train_on: str = "assistant"


@dataclass(frozen=True)
class TunerConfig:
    """``name``: lora or full. ``targets``: Hugging Face module names, ``all-linear``, or one regular expression.

    ``path``: a PEFT adapter folder to start from. ``rslora``: scale by alpha / sqrt(r) instead of alpha / r. ``dora``:
    the length of each adapted row learns by itself. ``init``: default or pissa. ``loraplus_lr_ratio``: learning rate of
    B in units of A's. ``modules_to_save``: embedding, head or norms that learn whole beside the
    adapter. ``quantise``: null, or nf4: the frozen base's
    linears in 4 bits. ``freeze`` (full): patterns of weights that do not learn.
    """

    name: str = "lora"
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    loraplus_lr_ratio: float = 1.0
    targets: str | list[str] = "all-linear"
    freeze: list[str] = field(default_factory=list)
    quantise: str | None = None
    modules_to_save: list[str] = field(default_factory=list)
    path: str | None = None


@dataclass(frozen=True)
class ExpertsConfig:
    """``balancing_loss``: coefficient of the routers' loss; None: as the model's config.json asks.

    ``balancing_over``: what it is a loss of, sequence or micro_batch. ``capacity_factor``: an expert takes so many
    times its share of a rank's tokens, and others are dropped; None: it takes all.
    ``bias_rate``: by how much a step moves the biases that balance the choice of experts; 0: they stay as they are.
    """

    balancing_loss: float | None = None
    balancing_over: str = "sequence"
    capacity_factor: float | None = None
    bias_rate: float = 0.0


@dataclass(frozen=True)
class GaloreConfig:
    """``rank``: dimensions that gradients of the layers' linears are projected to. ``update_steps``: every so many
    steps the subspace is chosen anew. ``scale``: factor of the update. ``projection``: std, reverse_std, left or right
    (``parallel.galore_spec``).
    """

    rank: int = 128
    update_steps: int = 200
    scale: float = 0.25
    projection: str = "std"


@dataclass(frozen=True)
class OptimizerConfig:
    """``name``: adamw, or (full tuning) galore. ``schedule``: constant, linear or cosine, after ``warmup_steps``;
    ``clip_norm`` 0 means no clipping.

    ``distributed``: each dp and cp rank keeps its part of the moments only; None: the plan derives it.

    ``lr_ratios`` (full tuning): patterns of weights to their learning rate in units of ``lr``.
    """

    name: str = "adamw"
    lr: float = 2e-4
    lr_ratios: dict[str, float] = field(default_factory=dict)
    min_lr: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    distributed: bool | None = None
    galore: GaloreConfig = field(default_factory=GaloreConfig)


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, how, and what stays.

    ``every_steps`` 0 means: at the end only. What stays: the newest ``keep_last``, those of steps that ``keep_every``
    divides, and the ``keep_best`` with the lowest ``metric``; 0 and 0 for the first and the last: all.
    ``asynchronous``: written beside training. ``readback`` null: adapters are read back from the disk before they are
    published. ``on_failure``: what a save that the disk refuses does to the run.
    """

    every_steps: int = 50
    keep_last: int = 3
    keep_every: int = 0
    keep_best: int = 0
    metric: str = "loss"
    asynchronous: bool = False
    readback: bool | None = None
    on_failure: str = "stop"


@dataclass(frozen=True)
class RecoveryConfig:
    """What a run does about lost ranks. ``restarts``: how often all are started again without a new checkpoint.

    ``silent_s``, ``stalled_s``: how long a rank may give no sign of life, and all of them do no step, before that.
    ``node_faults``: lost starts after which a node of Slurm's is left out, where the range of nodes allows; 0: never.
    """

    restarts: int = 3
    silent_s: float = 120.0
    stalled_s: float = 1800.0
    node_faults: int = 2


@dataclass(frozen=True)
class AnomaliesConfig:
    """What is done about steps that the model should not learn from.

    ``not_finite``: of a loss or a gradient norm that is no number: stop, skip or rewind. ``spike``: of a loss above
    ``spike_factor`` times the median of the newest 32: warn, stop, skip or rewind. ``limit``: steps skipped in a row.
    """

    not_finite: str = "stop"
    spike: str = "warn"
    spike_factor: float = 3.0
    limit: int = 3


@dataclass(frozen=True)
class MetricsConfig:
    """``sinks``: any of jsonl, tensorboard, wandb. jsonl is always written. ``project``: wandb's."""

    sinks: list[str] = field(default_factory=lambda: ["jsonl"])
    project: str = "isotrain"
    progress: bool = True


@dataclass(frozen=True)
class SweepConfig:
    """What the points of a sweep do together. ``share_base``: those that can train in turns on one frozen base."""

    share_base: bool = False


@dataclass(frozen=True)
class JobConfig:
    """The whole request. Two equal jobs are the same run, whatever the cluster, topology or engine."""

    run_dir: str | None = None
    steps: int = 100
    seed: int = 0
    precision: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    anomalies: AnomaliesConfig = field(default_factory=AnomaliesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


def galore_spec(optimizer: OptimizerConfig) -> GaloreSpec | None:
    """What GaLore is asked for; None for plain AdamW.

    Example:
        >>> galore_spec(OptimizerConfig(name="galore")).rank
        128
    """
    return GaloreSpec(**asdict(optimizer.galore)) if optimizer.name == "galore" else None
