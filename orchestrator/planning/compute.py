"""Compute: how long one rank needs for one layer of one micro-batch, forward and backward, by class of operation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from orchestrator.planning.constants import Constants
from orchestrator.planning.setup import Setup, Software
from orchestrator.planning.shape import Linear

FUSED_BACKWARD = 2.5
"""Operations of fused attention backward / forward: the scores are computed again (Dao et al. 2022, section 3)."""
EXPERT_OPERATORS = 80
"""Operators that route, sort, exchange and compute the experts of a layer, and bring the tokens back."""
PLAIN = 2.0
"""Bytes that plain operators move / fused ones: a norm reads its input twice, an activation writes each step."""
CAST_BYTES = 4.0
"""Bytes per element of an input that is cast to 8 bits: read in 16 bits, written twice, once of them transposed."""
ACCUMULATED = (4.0, 12.0)
"""Bytes of a weight's gradient that is added to its sum in every micro-batch: inside of the product that makes it (then
all but one trip hides there), or by an operator of its own."""
OLD_ATTENTION = 0.5
"""FlashAttention-2 / kernels made for the device, from Hopper on (Shah et al. 2024, arXiv:2407.08608, section 1: 35 %
of an H100's peak against 75 %)."""
HOPPER = 5e14
"""Peak in 16 bits that tells Hopper and later devices from those before."""
END_OPERATORS = 76
"""Operators of embedding, last norm, output layer and loss: as many as a layer's with adapters (measured on a CPU)."""
ALIGNED = 8
"""Matrix units take rows of a multiple of 16 bytes; products with others run on the plain ones (cuBLAS guide, tensor
core usage)."""
DORA_OPERATORS = 18
"""Operators of one DoRA linear more than of LoRA's, per pass: lengths of rows, factors, and the output stretched."""
LOOPED_OPERATORS = 12
"""Operators of one expert that is computed by itself: tokens picked, three products, an activation, tokens added."""
UNPACKED_BYTES = (0.5, 16.5)
"""Bytes moved per element of an NF4 weight that is made whole, beside its values: by a kernel (4 bits are read), and by
torch's operators (bytes to indices, two fp32 looked up for each, and these read and written by the scale)."""
SCORE_BYTES = (13.0, 19.0)
"""Bytes per score forward and backward where scores are written (Korthikanti et al. 2022, section 4): the product
writes them, softmax and dropout read and write them and a mask, the next product reads them; and the same back."""


@dataclass(frozen=True)
class Work:
    """Seconds by class of operation."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.matmul + other.matmul, self.attention + other.attention, self.memory + other.memory)

    def __mul__(self, times: float) -> Work:
        return Work(self.matmul * times, self.attention * times, self.memory * times)

    @property
    def total(self) -> float:
        """All classes."""
        return self.matmul + self.attention + self.memory


@dataclass(frozen=True)
class LayerWork:
    """One layer of one micro-batch: forward, backward, and what is computed again before it."""

    forward: Work
    backward: Work
    again: Work
    host_s: float


def operators(software: Software, adapted: int, dora: bool = False) -> int:
    """That the host launches in a layer's forward pass, without experts; ``adapted``: linears with an adapter."""
    return software.operators + (4 + DORA_OPERATORS * dora) * adapted


@dataclass(frozen=True)
class Computing:
    """What the layers of a setup take."""

    setup: Setup
    constants: Constants

    @cached_property
    def rate(self) -> float:
        """FLOP/s of the model's linears."""
        device, precision = self.setup.device, self.setup.precision
        name = device.precision(precision)
        share = self.constants.matmul if name in ("bf16", "fp16", "fp32") else self.constants.matmul_low
        return device.matmul_rate(precision) * share

    @cached_property
    def wide_rate(self) -> float:
        """FLOP/s of products that stay in 16 bits."""
        precision = self.setup.precision if self.setup.precision == "fp32" else "bf16"
        return self.setup.device.matmul_rate(precision) * self.constants.matmul

    @cached_property
    def memory_rate(self) -> float:
        """Bytes/s of the memory."""
        return self.setup.device.memory_rate * self.constants.memory

    @cached_property
    def is_low(self) -> bool:
        """Whether linears run in 8 or 4 bits."""
        return self.setup.device.precision(self.setup.precision) in ("fp8", "fp4")

    def layer(self, kind: str) -> LayerWork:
        """One layer of a kind: dense, moe, attention, mlp or state."""
        forward, backward = self._linears(kind)
        if kind == "moe":
            more, less = self._experts()
            forward, backward = forward + more, backward + less
        rest = self._elementwise(kind)
        forward, backward = forward + rest, backward + rest * 2
        score_forward = Work()
        if kind in ("dense", "moe", "attention"):
            score_forward, score_backward = self._scores()
            forward, backward = forward + score_forward, backward + score_backward
        passes = 3 if self.setup.recompute == "full" else 2
        return LayerWork(forward, backward, self._again(forward, score_forward), passes * self._host_s(kind))

    def _host_s(self, kind: str) -> float:
        """What the host needs to launch one pass over a layer."""
        count = operators(self.setup.software, len(self.setup.adapted(kind)), self.setup.dora)
        if kind == "moe":
            looped = self.setup.shape.experts // self.setup.ep * LOOPED_OPERATORS
            count += looped if self.setup.software.loops_experts else EXPERT_OPERATORS
        return count * self.constants.launch_s

    def ends(self, forward_only: bool = False) -> tuple[Work, Work]:
        """The output layer with its loss, and the embedding: forward and backward of both, of one micro-batch."""
        setup, shape = self.setup, self.setup.shape
        tokens, rows = setup.rank_tokens, shape.vocab / setup.tp
        products = 1 if forward_only else 2 if setup.frozen else 3
        operations = 2.0 * tokens * rows * shape.hidden
        read = 0.0 if setup.device.reads_weights else rows * shape.hidden
        moved = setup.value_bytes * (tokens * shape.hidden + read + tokens * rows)
        # logits: written and read in the model's type, and in fp32 read, exponentiated, and their gradient written
        logits = tokens * rows * ((4 if setup.software.fused_loss else 12) + 2 * setup.value_bytes)
        logits /= 2 if forward_only else 1
        head = Work(
            matmul=products * operations / (self.wide_rate * setup.device.product_share(setup.precision, tokens)),
            memory=(products * moved + logits) / self.memory_rate,
        )
        embedded = (2 if forward_only else 4) * tokens * shape.hidden * setup.value_bytes
        return head, Work(memory=embedded / self.memory_rate)

    def _product(self, tokens: float, linear: Linear, cuts: int, rate: float) -> Work:
        """One matrix product forward, on a rank that has ``1 / cuts`` of it."""
        whole = linear.cut == "whole"
        out = linear.out / (cuts if linear.cut == "column" else 1)
        width = linear.width / (cuts if linear.cut == "row" else 1)
        is_low = self.is_low and not whole
        size = 1 if is_low else self.setup.value_bytes
        moved = size * (tokens * width + out * width) + self.setup.value_bytes * tokens * out
        rate *= self.setup.device.product_share(self.setup.precision, tokens)
        busy = 2 * tokens * out * width / rate
        if not self.setup.device.reads_weights:
            busy = math.hypot(busy, moved / self.memory_rate)
        cast = CAST_BYTES * tokens * width if is_low else 0.0
        return Work(busy, memory=cast / self.memory_rate)

    def _unpacked(self, weights: float) -> Work:
        """So many elements of a quantised base made whole, which every product does for itself."""
        if not self.setup.quantised:
            return Work()
        device = self.setup.device
        each = UNPACKED_BYTES[device.is_measured] + self.setup.value_bytes
        return Work(memory=weights * each / self.memory_rate)

    def _linears(self, kind: str) -> tuple[Work, Work]:
        forward, setup = Work(), self.setup
        for linear in setup.shape.linears(kind):
            tokens = setup.rank_tokens / (setup.tp if linear.cut == "whole" and setup.sp else 1)
            forward += self._product(tokens, linear, setup.tp, self.wide_rate if linear.cut == "whole" else self.rate)
            forward += self._unpacked(linear.parameters / (1 if linear.cut == "whole" else setup.tp))
        backward = forward * (1 if setup.frozen else 2)
        if not setup.frozen:
            sums = setup.shape.dense_parameters(kind, setup.tp) * ACCUMULATED[0 if setup.software.fused else 1]
            backward += Work(memory=sums / self.memory_rate)
        if setup.adapter_rank:
            beside = self._adapters(kind)
            forward, backward = forward + beside, backward + beside * 2
        return forward, backward

    def _adapters(self, kind: str) -> Work:
        """Two thin products beside each linear, which move far more than they compute."""
        setup, found = self.setup, Work()
        for linear in setup.adapted(kind):
            out = linear.out / (setup.tp if linear.cut == "column" else 1)
            width = linear.width / (setup.tp if linear.cut == "row" else 1)
            operations = 2 * setup.rank_tokens * setup.adapter_rank * (out + width)
            moved = setup.value_bytes * setup.rank_tokens * (width + 3 * out)
            found += Work(operations / self.wide_rate, memory=moved / self.memory_rate)
        return found

    def _experts(self) -> tuple[Work, Work]:
        """The chosen experts of every token: grouped products, and tokens sorted by expert and back."""
        setup, shape = self.setup, self.setup.shape
        tokens = setup.rank_tokens * shape.experts_per_token / (setup.tp if setup.tp > 1 else 1) * setup.etp
        here = max(1, shape.experts // setup.ep)
        forward = Work()
        for linear in shape.mlp_linears(shape.expert_ffn):
            one = self._product(tokens, linear, setup.etp, self.rate * self.constants.expert)
            weights = setup.value_bytes * linear.parameters / setup.etp * (here - 1)
            forward += one + Work(memory=weights / self.memory_rate)
            forward += self._unpacked(linear.parameters / setup.etp * here)
        sorted_bytes = 6 * tokens * shape.hidden * setup.value_bytes
        activated = 2 * (3 if shape.gated else 2) * tokens * shape.expert_ffn / setup.etp
        moved = Work(memory=(sorted_bytes + activated) / self.memory_rate)
        sums = (
            0.0
            if setup.frozen
            else shape.expert_parameters() / (setup.ep * setup.etp) * ACCUMULATED[0 if setup.software.fused else 1]
        )
        backward = forward * (1 if setup.frozen else 2) + moved * 2 + Work(memory=sums / self.memory_rate)
        return forward + moved, backward

    def _elementwise(self, kind: str) -> Work:
        """Norms, residuals, rotation and activation of one layer forward: read once and written once."""
        setup, shape = self.setup, self.setup.shape
        tokens, size = setup.rank_tokens, setup.value_bytes
        wide = 5 * shape.hidden * (1 if kind in ("attention", "mlp", "state") else 2) / (setup.tp if setup.sp else 1)
        width = 0.0
        if kind in ("dense", "moe", "attention"):
            width += 2 * (shape.score_width + shape.key_value_width)
        if kind in ("dense", "mlp"):
            width += (3 if shape.gated else 2) * shape.ffn
        if kind == "moe":
            width += (3 if shape.gated else 2) * shape.shared_ffn
        if kind == "state":
            width += 40 * shape.hidden
        moved = tokens * size * (wide + width / setup.tp) * (1 if setup.software.fused else PLAIN)
        return Work(memory=moved / self.memory_rate)

    def _scores(self) -> tuple[Work, Work]:
        """Attention's scores and values, forward and backward."""
        setup, shape = self.setup, self.setup.shape
        tokens, heads = setup.rank_tokens, shape.heads / setup.tp
        width = (shape.score_width + shape.value_width) / setup.tp
        if setup.software.fused_attention:
            forward = 2 * tokens * shape.tokens_seen(setup.tokens) * width / self.wide_rate
            forward *= self.constants.matmul / self.constants.attention
            if not setup.software.native_attention and self.wide_rate / self.constants.matmul > HOPPER:
                forward /= OLD_ATTENTION
            return Work(attention=forward), Work(attention=forward * FUSED_BACKWARD)
        rate = self.wide_rate
        if shape.head_dim % ALIGNED:
            rate = min(rate, setup.device.peaks["fp32"] * self.constants.matmul)
        product = 2 * tokens * setup.tokens * width / rate
        scores = tokens * setup.tokens * heads / self.memory_rate
        return (
            Work(attention=product, memory=SCORE_BYTES[0] * scores),
            Work(attention=2 * product, memory=SCORE_BYTES[1] * scores),
        )

    def _again(self, forward: Work, scores: Work) -> Work:
        if self.setup.recompute == "full":
            return forward
        if self.setup.recompute == "selective" and not self.setup.software.fused_attention:
            return scores
        return Work()
