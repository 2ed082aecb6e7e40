"""Capabilities: what is built and proven today, and why a layout cannot run. Pure arithmetic, before any process.

Here is the only place that knows what is not built yet: when an axis, a precision or an engine becomes real, it is
entered in :data:`BUILT` and nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from parallel.families import FAMILIES
from parallel.specs import ModelSpec
from parallel.topology import Topology


@dataclass(frozen=True)
class Capabilities:
    """What may be asked for. ``axes``: those that may be larger than 1."""

    axes: tuple[str, ...] = ("tp", "pp", "dp", "cp", "ep", "etp", "vpp")
    sp: bool = True
    families: tuple[str, ...] = tuple(FAMILIES)
    tuners: tuple[str, ...] = ("lora", "full")
    engines: tuple[str, ...] = ("megatron",)
    recompute: tuple[str, ...] = ("none", "selective", "full")
    precisions: tuple[str, ...] = ("fp32", "bf16")
    objectives: tuple[str, ...] = ("sft",)


BUILT = Capabilities()


@dataclass(frozen=True)
class Proposal:
    """A layout to be judged. ``vpp`` None or 1: no virtual chunks. Sequences are whole rows of a batch.

    ``distributed``: each of the dp x cp ranks keeps its part of the optimizer's state only.
    """

    topology: Topology
    vpp: int | None = None
    sp: bool = False
    global_sequences: int = 1
    micro_sequences: int = 1
    tuner: str = "lora"
    quantise: str | None = None
    engine: str = "megatron"
    recompute: str = "none"
    precision: str = "fp32"
    cp_comm: str = "ring"
    distributed: bool = False
    optimizer: str = "adamw"

    @property
    def chunks(self) -> int:
        """Pipeline chunks: ``pp * vpp``."""
        return self.topology.pp * (self.vpp or 1)

    @property
    def micro_batches(self) -> int:
        """Forward passes of each data-parallel rank in one optimizer step; on some the last may be :attr:`empty`."""
        return -(-self.global_sequences // (self.topology.dp * self.micro_sequences))

    @property
    def empty(self) -> int:
        """Forward passes without rows, of all data-parallel ranks together, where dp does not divide the batch."""
        return self.topology.dp * self.micro_batches - self.global_sequences // self.micro_sequences


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot run: the numbers and the config keys; ``hint`` can be typed as it is."""

    message: str
    hint: str


def refusals(model: ModelSpec, proposal: Proposal, built: Capabilities = BUILT) -> list[Refusal]:
    """All reasons why ``model`` cannot run as proposed; empty when it can.

    Returns:
        Those of :func:`model_refusals`, then those of :func:`batch_refusals`.
    """
    return model_refusals(model, proposal, built) + batch_refusals(proposal)


def model_refusals(model: ModelSpec, proposal: Proposal, built: Capabilities = BUILT) -> list[Refusal]:
    """Why the model cannot be cut as proposed, whatever the batch.

    The vocabulary is padded, so it is never a reason.

    Returns:
        What is not built first, then what does not divide the model.
    Example:
        >>> heads = ModelSpec("llama", 2, 24, 6, 3, 4, 48, 64, 128, 1e-5, 1e4, True)
        >>> model_refusals(heads, Proposal(Topology(tp=2)))[0].message
        'model has 3 key/value heads, which topology.tp=2 does not divide'
    """
    rules = (
        *(_not_built, _axes_not_built, _tensor_cuts, _expert_cuts, _layers, _sequence_parallel),
        *(_context_parallel, _quantised_cuts, _projected),
    )
    return [refusal for rule in rules for refusal in rule(model, proposal, built)]


def nearest(value: int, legal: Iterable[int]) -> int:
    """The legal value whose ratio to ``value`` is smallest; the larger of two.

    Example:
        >>> nearest(2, [1, 3]), nearest(8, [1, 2, 4]), nearest(2, [1, 4])
        (3, 4, 4)
    """
    return min(legal, key=lambda candidate: (round(abs(math.log(candidate / value)), 9), -candidate))


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def legal_tensor_sizes(model: ModelSpec) -> list[int]:
    """Every ``topology.tp`` that divides the model, ascending."""
    return divisors(math.gcd(model.heads, model.kv_heads, *model.dense_mlps))


def _not_built(model: ModelSpec, proposal: Proposal, built: Capabilities) -> Iterator[Refusal]:
    choices = [
        ("engine", proposal.engine, built.engines),
        ("tuner", proposal.tuner, built.tuners),
        ("memory.recompute", proposal.recompute, built.recompute),
        ("precision", proposal.precision, built.precisions),
    ]
    for key, asked, known in choices:
        if asked not in known:
            yield Refusal(f"{key}={asked} is not built; there is {', '.join(known)}", f"{key}={known[0]}")
    if model.family not in built.families:
        yield Refusal(
            f"model family {model.family} is not built; there is {', '.join(built.families)}", "model=smollm2_135m"
        )


def _axes_not_built(model: ModelSpec, proposal: Proposal, built: Capabilities) -> Iterator[Refusal]:
    topology = proposal.topology
    for axis in ("tp", "pp", "dp", "cp", "ep", "etp"):
        size = getattr(topology, axis)
        if size > 1 and axis not in built.axes:
            yield Refusal(f"topology.{axis}={size} is not built yet: only {axis}=1 runs", f"topology.{axis}=1")
    if (proposal.vpp or 1) > 1 and "vpp" not in built.axes:
        yield Refusal(
            f"topology.vpp={proposal.vpp} is not built yet: stages run without virtual chunks", "topology.vpp=null"
        )
    if proposal.sp and not built.sp:
        yield Refusal("topology.sp=true is not built yet", "topology.sp=false")


def _tensor_cuts(model: ModelSpec, proposal: Proposal, _: Capabilities) -> Iterator[Refusal]:
    tp = proposal.topology.tp
    hint = f"topology.tp={nearest(tp, legal_tensor_sizes(model))}"
    heads = {"attention heads": model.heads, "key/value heads": model.kv_heads}
    uncut = [f"{count} {name}" for name, count in heads.items() if count % tp]
    if uncut:
        yield Refusal(f"model has {' and '.join(uncut)}, which topology.tp={tp} does not divide", hint)
    for rows in model.dense_mlps:
        if rows % tp:
            yield Refusal(f"model has an MLP of {rows} rows, which topology.tp={tp} does not divide", hint)


def _expert_cuts(model: ModelSpec, proposal: Proposal, _: Capabilities) -> Iterator[Refusal]:
    ep, etp = proposal.topology.ep, proposal.topology.etp
    if not model.is_moe:
        for axis, size in (("ep", ep), ("etp", etp)):
            if size > 1:
                yield Refusal(f"topology.{axis}={size} needs experts, but the model is dense", f"topology.{axis}=1")
        return
    if model.experts % ep:
        legal = nearest(ep, divisors(model.experts))
        yield Refusal(
            f"model has {model.experts} experts, which topology.ep={ep} does not divide", f"topology.ep={legal}"
        )
    if model.experts_per_token == 1 and model.normalise_expert_weights:
        yield Refusal(
            "one expert per token with normalised weights is not built: every weight would be 1, and no router learns",
            "model=qwen3_30b_a3b",
        )
    if model.expert_ffn % etp:
        legal = nearest(etp, divisors(model.expert_ffn))
        yield Refusal(
            f"model has experts of {model.expert_ffn} rows, which topology.etp={etp} does not divide",
            f"topology.etp={legal}",
        )


def _layers(model: ModelSpec, proposal: Proposal, _: Capabilities) -> Iterator[Refusal]:
    pp, vpp = proposal.topology.pp, proposal.vpp or 1
    if model.layers < proposal.chunks:
        virtual = f" x topology.vpp={vpp} = {proposal.chunks} chunks" if vpp > 1 else " stages"
        hint = f"topology.pp={model.layers}" + (" topology.vpp=null" if vpp > 1 else "")
        yield Refusal(f"model has {model.layers} layers, too few for topology.pp={pp}{virtual}", hint)
    if vpp > 1 and pp == 1:
        yield Refusal(f"topology.vpp={vpp} needs topology.pp larger than 1", "topology.vpp=null")


def _sequence_parallel(model: ModelSpec, proposal: Proposal, _: Capabilities) -> Iterator[Refusal]:
    tp = proposal.topology.tp
    if proposal.sp and tp == 1:
        yield Refusal("topology.sp=true needs topology.tp larger than 1, but topology.tp=1", "topology.sp=false")
    if model.is_moe and tp > 1 and not proposal.sp:
        # otherwise every tp rank would send all tokens to the experts, tp times each
        yield Refusal(f"experts with topology.tp={tp} need topology.sp=true", "topology.sp=true")


def _context_parallel(model: ModelSpec, proposal: Proposal, _: Capabilities) -> Iterator[Refusal]:
    """The ring cuts tokens only; ulysses deals out heads too (key/value heads too few for that are sent twice)."""
    tp, cp = proposal.topology.tp, proposal.topology.cp
    if proposal.cp_comm == "ulysses" and model.heads % tp == 0 and model.heads // tp % cp:
        yield Refusal(
            f"topology.cp_comm=ulysses deals out attention heads, but topology.cp={cp} does not divide the "
            f"{model.heads // tp} of a rank ({model.heads} heads / topology.tp={tp})",
            "topology.cp_comm=ring",
        )


def quantised_tensor_sizes(model: ModelSpec) -> list[int]:
    """Every ``topology.tp`` that cuts dense rows between blocks of 64, ascending; none where a row is not blocks.

    Example:
        >>> quantised_tensor_sizes(ModelSpec("llama", 2, 192, 6, 6, 64, 768, 64, 128, 1e-5, 1e4, True))
        [1, 2, 3, 6]
    """
    if model.hidden % 64:
        return []
    rows = (model.heads * model.head_dim, *model.dense_mlps)  # of o_proj and down_proj, whose columns are cut
    return [tp for tp in legal_tensor_sizes(model) if all(row % (64 * tp) == 0 for row in rows)]


def _quantised_cuts(model: ModelSpec, proposal: Proposal, _: Capabilities) -> Iterator[Refusal]:
    """NF4 keeps one scale for 64 elements of a row, so a row is cut at multiples of 64 only."""
    if proposal.quantise is None:
        return
    if proposal.tuner == "full":
        yield Refusal(f"tuner.quantise={proposal.quantise} freezes the base, but tuner=full trains it", "tuner=qlora")
    if model.latent is not None:
        yield Refusal(f"tuner.quantise={proposal.quantise} is not built for latent attention", "tuner.quantise=null")
        return
    tp, etp, legal = proposal.topology.tp, proposal.topology.etp, quantised_tensor_sizes(model)
    rows = {"o_proj": model.heads * model.head_dim, "down_proj": model.ffn, "experts' down_proj": model.expert_ffn}
    held = {"o_proj", *(["down_proj"] if model.dense_mlps else []), *(["experts' down_proj"] if model.is_moe else [])}
    words = {name: f"{width} ({name})" for name, width in rows.items() if name in held}
    if not legal or (model.is_moe and model.expert_ffn % 64):
        yield Refusal(
            f"tuner.quantise={proposal.quantise} needs rows of whole blocks of 64 elements, but the model's have "
            f"{model.hidden}, {' and '.join(words.values())}",
            "tuner.quantise=null",
        )
        return
    experts = words.pop("experts' down_proj", "")
    if tp not in legal:
        yield Refusal(
            f"tuner.quantise={proposal.quantise} with topology.tp={tp} would cut rows of "
            f"{' and '.join(words.values())} elements inside a block of 64; legal are {', '.join(map(str, legal))}",
            f"topology.tp={nearest(tp, legal)}",
        )
    if experts and model.expert_ffn % (64 * etp):
        sizes = divisors(model.expert_ffn // 64)
        yield Refusal(
            f"tuner.quantise={proposal.quantise} with topology.etp={etp} would cut rows of {experts} elements inside a "
            f"block of 64; legal are {', '.join(map(str, sizes))}",
            f"topology.etp={nearest(etp, sizes)}",
        )


def _projected(_: ModelSpec, proposal: Proposal, __: Capabilities) -> Iterator[Refusal]:
    """GaLore projects whole matrices; the distributed optimizer's ranges begin and end anywhere in them."""
    if proposal.optimizer != "galore":
        return
    if proposal.tuner != "full":
        yield Refusal(
            f"optimizer=galore projects gradients of whole matrices, but tuner.name={proposal.tuner} trains adapters, "
            "which are small already",
            "optimizer=adamw",
        )
    if proposal.distributed:
        yield Refusal(
            "optimizer.distributed=true deals moments out by ranges of elements, but optimizer=galore projects whole "
            "matrices",
            "optimizer.distributed=false",
        )


def batch_refusals(proposal: Proposal) -> list[Refusal]:
    """Why the global batch cannot be split as proposed.

    That dp does not divide it is no reason (some ranks then run a micro-batch without rows), nor is the rows' length,
    as they are padded to a multiple.

    Example:
        >>> batch_refusals(Proposal(Topology(dp=3), global_sequences=2))[0].hint
        'topology.dp=2'
    """
    rows, micro, topology = proposal.global_sequences, proposal.micro_sequences, proposal.topology
    if rows % micro:
        message = f"batch.global_sequences={rows} is no multiple of batch.micro_sequences={micro}"
        return [Refusal(message, f"batch.micro_sequences={nearest(micro, divisors(rows))}")]
    if topology.dp > rows // micro:
        message = (
            f"batch.global_sequences={rows} in micro-batches of {micro} gives topology.dp={topology.dp} ranks only "
            f"{rows // micro}"
        )
        return [Refusal(message, f"topology.dp={rows // micro}")]
    if (proposal.vpp or 1) > 1 and proposal.micro_batches % topology.pp:
        # the interleaved schedule of megatron-core runs micro-batches in rounds of pp
        message = (
            f"topology.vpp={proposal.vpp} needs micro-batches in multiples of topology.pp={topology.pp}, but there are "
            f"{proposal.micro_batches} (batch.global_sequences={rows} / dp={topology.dp} / micro_sequences={micro})"
        )
        return [Refusal(message, "topology.vpp=null")]
    return []
