"""Short training runs of tiny models, run by every rank of a test: what comes back can be compared with one process."""

from __future__ import annotations

import gc
import tempfile
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.engine import IGNORED_LABEL, NO_SAMPLE, AdamSpec, EngineSpec, MicroBatch
from parallel.families import read_model
from parallel.galore_spec import GaloreSpec
from parallel.lora_spec import LoraSpec
from parallel.names import resolve_targets
from parallel.selection import frozen_weights, rate_ratios, saved_weights
from parallel.specs import ModelSpec
from parallel.topology import Topology

TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 8,
    "intermediate_size": 96,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
GEMMA = {"head_dim": 12, "num_key_value_heads": 2, "num_attention_heads": 4, "query_pre_attn_scalar": 10}
GEMMA |= {"pad_token_id": None}  # transformers lets no gradient into its row, and here it is a token like others
GEMMA |= {"sliding_window": 5, "hidden_activation": "gelu_pytorch_tanh"}
DEEPSEEK = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 2}
DEEPSEEK |= {"moe_intermediate_size": 24, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "gemma2": {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    "gemma3_text": {
        **GEMMA,
        "model_type": "gemma3_text",
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "num_attention_heads": 4},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "deepseek_v2": {
        **DEEPSEEK,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        **DEEPSEEK,
        "model_type": "deepseek_v3",
        "q_lora_rank": 20,
        "first_k_dense_replace": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
}


def config(family: str, **changes: Any) -> dict[str, Any]:
    """A tiny ``config.json`` mapping."""
    return {**TINY, **FAMILIES[family], **changes}


def lighthouse_rows(model: Path, count: int, tokens: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """The first rows of the shipped chat data as ``(tokens, labels)``, each cut or padded to ``tokens``."""
    from orchestrator.config.job import DataConfig, ObjectiveConfig
    from orchestrator.data import prepare

    with tempfile.TemporaryDirectory() as cache:
        data = prepare(DataConfig("builtin:lighthouse"), ObjectiveConfig(), model, 512, Path(cache))
        rows = []
        for index in range(count):
            ids, learned = (list(map(int, each)) for each in data.row(index))
            labels = [token if learn else IGNORED_LABEL for token, learn in zip(ids[1:], learned[1:], strict=True)]
            padding = max(0, tokens - len(labels))
            rows.append(
                (tuple((ids[:-1] + [0] * padding)[:tokens]), tuple((labels + [IGNORED_LABEL] * padding)[:tokens]))
            )
    return tuple(rows)


@dataclass(frozen=True)
class Run:
    """What a short run does; the same on every rank."""

    family: str = "llama"
    topology: Topology = field(default_factory=Topology)
    steps: int = 3
    global_sequences: int = 8
    micro_sequences: int = 2
    tokens: int = 12
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    eps: float = 1e-8
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False
    lr_ratio: float = 1.0
    init: str = "default"
    quantise: str | None = None
    modules_to_save: tuple[str, ...] = ()
    full: bool = False
    freeze: tuple[str, ...] = ()
    lr_ratios: tuple[tuple[str, float], ...] = ()
    galore: GaloreSpec | None = None
    sp: bool = False
    vpp: int | None = None
    stages: tuple[tuple[int, ...], ...] | None = None
    cp_comm: str = "ring"
    distributed: bool = False
    recompute: str = "none"
    precision: str = "fp32"
    balancing_loss: float = 0.0
    balancing_over: str = "sequence"
    capacity_factor: float | None = None
    bias_rate: float = 0.0
    seed: int = 3
    changes: tuple[tuple[str, Any], ...] = ()
    rows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()  # (tokens, labels) to take instead of random ones

    @property
    def model(self) -> ModelSpec:
        """The model's shape."""
        return read_model(config(self.family, **dict(self.changes)))

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def on(self, **changes: Any) -> Run:
        """The same run somewhere else."""
        return replace(self, **changes)


def even_stages(layers: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """Contiguous chunks of layers, the first ones larger where they do not divide."""
    base, extra = divmod(layers, chunks)
    result, start = [], 0
    for chunk in range(chunks):
        size = base + (chunk < extra)
        result.append(tuple(range(start, start + size)))
        start += size
    return tuple(result)


def engine_spec(run: Run) -> EngineSpec:
    """The engine's view of a run."""
    targets = list(run.targets) if isinstance(run.targets, tuple) else run.targets
    attention_only = run.model.is_moe and targets == "all-linear"
    resolved = resolve_targets(r".*\.self_attn\..*" if attention_only else targets, run.model)
    saved = saved_weights(run.modules_to_save, run.model)
    lora = LoraSpec(4, 8.0, run.dropout, run.rslora, resolved, run.dora, run.lr_ratio, run.init, saved)
    stages = run.stages or even_stages(run.model.layers, run.topology.pp * (run.vpp or 1))
    return EngineSpec(
        model=run.model,
        stages=stages,
        lora=None if run.full else lora,
        adam=AdamSpec(eps=run.eps, distributed=run.distributed),
        vpp=run.vpp,
        sp=run.sp,
        precision=run.precision,
        recompute=run.recompute,
        seed=run.seed,
        sequence_tokens=run.tokens,
        cp_comm=run.cp_comm,
        balancing_loss=run.balancing_loss,
        balancing_over=run.balancing_over,
        capacity_factor=run.capacity_factor,
        bias_rate=run.bias_rate,
        quantise=run.quantise,
        frozen=frozen_weights(run.freeze, run.model),
        lr_ratios=rate_ratios(dict(run.lr_ratios), run.model),
        galore=run.galore,
    )


def global_batch(run: Run, step: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """``(tokens, labels, sample id)`` of every row of one step; some positions have no label."""
    if run.rows:
        first = step * run.global_sequences
        chosen = [run.rows[(first + index) % len(run.rows)] for index in range(run.global_sequences)]
        return [(torch.tensor(tokens), torch.tensor(labels), first + i) for i, (tokens, labels) in enumerate(chosen)]
    generator = torch.Generator().manual_seed(run.seed * 1000 + step)
    rows = []
    for index in range(run.global_sequences):
        tokens = torch.randint(0, run.model.vocab, (run.tokens + 1,), generator=generator)
        labels = tokens[1:].clone()
        labels[: int(torch.randint(0, run.tokens // 2, (1,), generator=generator))] = IGNORED_LABEL
        rows.append((tokens[:-1], labels, step * run.global_sequences + index))
    return rows


def microbatches(run: Run, step: int, dp_rank: int) -> list[MicroBatch]:
    """This data-parallel rank's share of a step; one micro-batch of padding more where dp does not divide the batch."""
    mine, dp, rows = global_batch(run, step)[dp_rank :: run.topology.dp], run.topology.dp, run.micro_sequences
    if run.global_sequences % (dp * rows):
        assert rows == 1
        nothing = torch.zeros(run.tokens, dtype=torch.int64), torch.full((run.tokens,), IGNORED_LABEL), NO_SAMPLE
        mine += [nothing] * (-(-run.global_sequences // dp) - len(mine))
    return [
        MicroBatch(
            torch.stack([row[0] for row in part]),
            torch.stack([row[1] for row in part]),
            tuple(row[2] for row in part),
        )
        for part in (mine[i : i + run.micro_sequences] for i in range(0, len(mine), run.micro_sequences))
    ]


def open_engine(run: Run, base_folder: str | None = None, watch: Any = None) -> tuple[Any, Any]:
    """Open groups and an engine on this rank (None, None on ranks beyond the topology); ``watch`` wraps the reader."""
    if dist.get_rank() >= run.topology.world_size:
        return None, None
    from parallel.engines.megatron import MegatronEngine
    from parallel.groups import open_groups

    groups = open_groups(run.topology, dist.get_rank())
    reader = None
    if base_folder is not None:
        from orchestrator.checkpoint.hf_reader import HfReader

        reader = HfReader(Path(base_folder))
        reader = watch(reader) if watch else reader
    return MegatronEngine(engine_spec(run), groups, reader), groups


def pieces(engine: Any) -> list[tuple[Any, ...]]:
    """This rank's training state as picklable ``(name, kind, shape, box, array)``."""
    return [(s.name, s.kind, s.shape, s.box, s.data.detach().float().cpu().numpy().copy()) for s in engine.shards()]


def train(run: Run, base_folder: str | None = None) -> tuple[list[float], list[float], list[tuple[Any, ...]]]:
    """Train; returns losses, gradient norms and this rank's pieces."""
    engine, groups = open_engine(run, base_folder)
    if engine is None:
        return [], [], []
    results = [
        engine.train_step(microbatches(run, step, groups.coordinate("dp")), run.rate(step)) for step in range(run.steps)
    ]
    state = pieces(engine)
    groups.close()
    return [result.loss for result in results], [result.grad_norm for result in results], state


def logits(run: Run, base_folder: str, tokens: list[list[int]]) -> Any:
    """Logits of the loaded model as an array (last stage), None elsewhere."""
    engine, groups = open_engine(run, base_folder)
    if engine is None:
        return None
    value = engine.logits(torch.tensor(tokens))
    groups.close()
    return None if value is None else value.cpu().numpy()


def merge(states: list[list[tuple[Any, ...]]]) -> dict[tuple[str, str], torch.Tensor]:
    """Put all ranks' pieces together; checks that replicas are equal and nothing is missing."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for state in states:
        for name, kind, shape, box, array in state:
            target = whole.setdefault((name, kind), torch.full(shape, float("nan")))
            value, there = torch.from_numpy(array), target[box.slices]
            known = ~there.isnan()
            assert torch.equal(there[known], value[known]), f"replicas of {name} {kind} differ"
            target[box.slices] = value
    for key, value in whole.items():
        assert not value.isnan().any(), f"{key} has holes"
    return whole


class DictReader:
    """A TensorReader over merged tensors."""

    def __init__(self, tensors: dict[tuple[str, str], torch.Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, kind: str, box: Any) -> torch.Tensor:
        """One box."""
        return self._tensors[name, kind][box.slices].clone()

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """The whole shape."""
        return tuple(self._tensors[name, kind].shape)


def go_on(run: Run, arrays: dict[tuple[str, str], Any], completed: int) -> tuple[list[float], list[tuple[Any, ...]]]:
    """Load a state (name, kind -> array) after ``completed`` steps, train to the end of the run; losses and pieces."""
    engine, groups = open_engine(run)
    if engine is None:
        return [], []
    engine.load(DictReader({key: torch.from_numpy(value) for key, value in arrays.items()}), moments=True)
    engine.set_optimizer_steps(completed)
    losses = [
        engine.train_step(microbatches(run, step, groups.coordinate("dp")), run.rate(step)).loss
        for step in range(completed, run.steps)
    ]
    state = pieces(engine)
    groups.close()
    return losses, state


def evaluate_and_train(run: Run) -> tuple[float, float, float]:
    """The loss of step 0's batch by evaluate, by train_step, and by evaluate after it."""
    engine, groups = open_engine(run)
    batches = microbatches(run, 0, groups.coordinate("dp"))
    before = engine.evaluate(batches)
    assert before.grad_norm == 0.0
    trained = engine.train_step(batches, run.learning_rate)
    labels = sum(int((row[1] != IGNORED_LABEL).sum()) for row in global_batch(run, 0))
    assert trained.label_tokens == before.label_tokens == labels
    after = engine.evaluate(batches)
    engine.close()
    groups.close()
    return before.loss, trained.loss, after.loss


def keeps_its_base(run: Run, base_folder: str) -> bool:
    """Whether the reader of the base, whose mapped files count as memory, outlives the engine's first step."""
    readers: list[Any] = []

    def watched(reader: Any) -> Any:
        readers.append(weakref.ref(reader))
        return reader

    engine, groups = open_engine(run, base_folder, watched)
    engine.train_step(microbatches(run, 0, groups.coordinate("dp")), run.rate(0))
    groups.close()
    return readers[0]() is not None


def threads_after(engines: int) -> list[int]:
    """How many threads this process has after each of so many engines that came and went."""
    counts = []
    for _ in range(engines):
        run = Run()
        engine, groups = open_engine(run)
        engine.train_step(microbatches(run, 0, groups.coordinate("dp")), run.rate(0))
        engine.close()
        groups.close()
        del engine, groups
        gc.collect()
        counts.append(sum(1 for _ in Path("/proc/self/task").iterdir()))
    return counts


def gradients_that_never_come(run: Run) -> str:
    """Train a step with a parameter that takes no part in it; the error's words."""
    from parallel.engines.megatron import NoGradientError
    from parallel.lora import LoraPart

    engine, groups = open_engine(run)
    part = next(module for chunk in engine._chunks for module in chunk.modules() if isinstance(module, LoraPart))
    part.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    try:
        engine.train_step(microbatches(run, 0, 0), 1e-3)
    except NoGradientError as error:
        return str(error)
    finally:
        groups.close()
    return ""


def gradient_buffer_elements(run: Run) -> int:
    """Elements of megatron-core's gradient buffers on this rank."""
    engine, groups = open_engine(run)
    count = sum(buffer.numel for chunk in engine._wrapped for buffer in chunk.buffers)
    groups.close()
    return count
