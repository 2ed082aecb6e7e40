"""Talking: what ranks tell each other inside of a layer, over tp, cp and ep."""

from __future__ import annotations

import math

from orchestrator.planning.compute import FUSED_BACKWARD
from orchestrator.planning.constants import Constants
from orchestrator.planning.links import Links
from orchestrator.planning.setup import Setup


def layer_talk(
    setup: Setup, links: Links, constants: Constants, kind: str, attention_s: float, forward_only: bool = False
) -> tuple[float, float, float]:
    """What ranks tell each other in one layer, forward and backward: over tp, cp and ep."""
    attends = kind in ("dense", "moe", "attention")
    blocks = (1 if kind != "dense" else 2) if attends or kind != "moe" else 0
    full = setup.recompute == "full"
    states = setup.rank_tokens * setup.shape.hidden * setup.value_bytes
    # an all-reduce after each block forward and before it backward; with sequence parallelism a gather and a scatter
    # as large, and the inputs gathered once more for the weights' gradient (Korthikanti et al. 2022, section 4.2.2)
    passes = 1 if forward_only else 2 + full + (0.5 if setup.sp and not setup.frozen else 0)
    tensor = blocks * passes * links.reduce_s(states, setup.tp) + _adapters_talk_s(setup, links, kind)
    tensor += _latents_talk_s(setup, links, forward_only) if attends else 0.0
    if setup.software.overlaps_tensor and setup.sp:
        tensor *= 1 - constants.hidden
    context = _context_s(setup, links, attention_s, constants, forward_only) if attends else 0.0
    expert = _expert_s(setup, links) * (2 if forward_only else 4 + 2 * full) if kind == "moe" else 0.0
    return tensor, context, expert


def _adapters_talk_s(setup: Setup, links: Links, kind: str) -> float:
    """What makes ``A x`` whole over tp, in few bytes, but as many messages as hidden states take.

    Of a row-cut linear it is summed going forward, of a column-cut one its gradient coming back; with sequence
    parallelism it is a gather and a scatter of each. DoRA's lengths of rows that are cut are summed, too.
    """
    full = setup.recompute == "full"
    low = setup.rank_tokens * setup.adapter_rank * setup.value_bytes
    linears = [linear for linear in setup.adapted(kind) if linear.cut != "whole"]
    rows = [linear for linear in linears if linear.cut == "row"]
    lengths = sum((1 + full) * links.reduce_s(4 * linear.out, setup.tp) for linear in rows) if setup.dora else 0.0
    if setup.sp:
        return lengths + len(linears) * (2 + full) * links.gather_s(low, setup.tp)
    return lengths + (len(linears) + full * len(rows)) * links.reduce_s(low, setup.tp)


def _latents_talk_s(setup: Setup, links: Links, forward_only: bool) -> float:
    """Latent attention's inputs besides hidden states: the latent and the rotary features that all heads share.

    Each rank's heads give them gradients, which are summed; with sequence parallelism both are gathered first.
    """
    latent = setup.shape.latent
    if latent is None:
        return 0.0
    size = setup.rank_tokens * setup.value_bytes
    widths = (latent.latent_rank, latent.rotary_dim)
    if not setup.sp:
        return 0.0 if forward_only else sum(links.reduce_s(size * width, setup.tp) for width in widths)
    if forward_only:
        return sum(links.gather_s(size * width, setup.tp) for width in widths)
    full, again = setup.recompute == "full", (not setup.frozen, False)  # a weight's gradient takes its input again
    return sum(
        (2 + full + more) * links.gather_s(size * width, setup.tp) for width, more in zip(widths, again, strict=True)
    )


def _expert_s(setup: Setup, links: Links) -> float:
    """One all-to-all of the tokens' copies over ep, and their gathering over etp."""
    tokens = setup.rank_tokens / (setup.tp if setup.tp > 1 else 1)
    copies = tokens * setup.shape.experts_per_token * setup.shape.hidden * setup.value_bytes
    return links.exchange_s(copies, setup.shape.experts_per_token, setup.ep, setup.etp) + links.gather_s(
        copies * setup.etp, setup.etp
    )


def _context_s(
    setup: Setup, links: Links, attention_s: float, constants: Constants, forward_only: bool = False
) -> float:
    """What context-parallel ranks tell each other in one layer, for one micro-batch forward and backward.

    Ring: keys and values make ``cp - 1`` hops forward and as many backward, their fp32 gradients ``cp``; hops hide
    behind the attention of the block before. Ulysses: queries, keys, values and outputs are traded by an all-to-all
    each, forward and backward; key/value heads too few to deal out are sent more than once.
    """
    cp, shape = setup.cp, setup.shape
    if cp == 1:
        return 0.0
    passes = 1 if forward_only else 2 + (setup.recompute != "none")
    groups = max(1, shape.kv_heads // setup.tp)
    if setup.cp_comm == "ulysses":
        dealt = 2 * shape.heads // setup.tp + 2 * math.lcm(groups, cp)
        share = setup.rank_tokens * dealt * shape.value_width // shape.heads * setup.value_bytes
        return passes * (links.exchange_s(share, 1, cp, setup.tp) + (cp - 1) * links.latency_s)
    values = setup.rank_tokens * max(shape.key_value_width / setup.tp, 2 * groups * shape.head_dim)
    rate = links.ring_rate(cp, setup.tp)
    hops = passes * (cp - 1) * (values * setup.value_bytes / rate + links.latency_s)
    if not forward_only:
        hops += cp * (values * 4 / rate + links.latency_s)
    attending = attention_s * (1 if forward_only else 1 + FUSED_BACKWARD)
    return max(hops - constants.hidden * attending, hops * (1 - constants.hidden))
