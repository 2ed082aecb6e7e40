"""Attention over cut rows is attention: output and all gradients, by ring and by all-to-all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.sequence import in_order
from tests.helpers.attention import Case, attend_on_a_rank, whole_results
from tests.helpers.pool import Pool, RankError

CASES = {
    "as-many-groups-as-heads": Case(heads=12, groups=12),
    "grouped": Case(heads=12, groups=6, seed=1),
    "one-group": Case(heads=12, groups=1, seed=2),
    "groups-that-no-rank-count-divides": Case(heads=60, groups=5, width=4, seed=3),
    "long-rows": Case(heads=12, groups=4, tokens=24 * 30, batch=1, seed=4),
    "window-within-a-chunk": Case(heads=12, groups=2, tokens=48, seed=6, window=3),
    "window-over-chunks": Case(heads=12, groups=4, tokens=48, seed=7, window=29),
    "window-longer-than-the-row": Case(heads=12, groups=4, seed=8, window=24),
    "capped": Case(heads=12, groups=4, seed=9, cap=1.5),
    "capped-window-of-long-rows": Case(heads=12, groups=4, tokens=24 * 30, batch=1, seed=10, window=200, cap=1.5),
    "one-token-per-chunk": Case(heads=12, groups=3, seed=5, tokens=0),
}


@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_cut_attention_equals_whole_attention(pool: Pool, kind: str, cp: int) -> None:
    cases = [case if case.tokens else replace(case, tokens=2 * cp) for case in CASES.values()]
    ranks = pool.run(cp, attend_on_a_rank, cases, kind, cp)
    for name, case, *found in zip(CASES, cases, *ranks, strict=True):
        for what, expected, *parts in zip(("out", "dq", "dk", "dv"), whole_results(case), *found, strict=True):
            whole = in_order(torch.stack([torch.from_numpy(each) for each in parts]))
            error = torch.linalg.vector_norm(whole - expected) / torch.linalg.vector_norm(expected)
            assert error <= (1e-5 if what == "out" else 1e-4), (name, what, float(error))


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_heads_that_the_ranks_do_not_divide(pool: Pool, kind: str) -> None:
    """The ring does not mind; ulysses is refused by the plan, and says so itself."""
    case = Case(heads=3, groups=3)
    if kind == "ring":
        assert pool.run(2, attend_on_a_rank, [case], kind, 2)[0][0][0].shape == (12, 2, 3, 8)
        return
    with pytest.raises(RankError, match="ulysses over 2 ranks cannot deal out 3 heads"):
        pool.run(2, attend_on_a_rank, [case], kind, 2)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_16_bit_attention_follows(pool: Pool, kind: str) -> None:
    """bf16 keeps 8 bits: outputs and gradients of whole and cut attention agree to its rounding."""
    case = Case(heads=4, groups=2, precision="bfloat16")
    found = [case_of_rank[0] for case_of_rank in pool.run(2, attend_on_a_rank, [case], kind, 2)]
    for expected, *ranks in zip(whole_results(case), *found, strict=True):
        whole = in_order(torch.stack([torch.from_numpy(each) for each in ranks]))
        assert torch.linalg.vector_norm(whole - expected) <= 1e-2 * torch.linalg.vector_norm(expected)
