"""Randomness is keyed by purpose, sample and name; nothing in it knows a rank."""

from __future__ import annotations

import torch

from parallel.seeding import DropoutClock, derive_seed, kaiming_uniform, normal
from parallel.sequence import SequenceCut


def test_streams_differ_by_every_part_of_their_key() -> None:
    keys = [(seed, use, name) for seed in (0, 1) for use in ("lora_A", "dropout") for name in ("a", "b", "ab")]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")


def test_kaiming_uniform_is_what_a_linear_layer_gets() -> None:
    value = kaiming_uniform((64, 100), 0, "x")
    assert value.abs().max() <= 0.1
    assert abs(value.std() - 0.1 / 3**0.5) < 1e-3
    assert torch.equal(value, kaiming_uniform((64, 100), 0, "x"))


def test_normal_has_its_standard_deviation() -> None:
    assert abs(normal((200, 200), 0.02, 0, "w").std() - 0.02) < 3e-4


def clock(*announced: tuple[int, tuple[int, ...]]) -> DropoutClock:
    made = DropoutClock(seed=5, width_tokens=16)
    made.begin_step()
    for number, samples in announced:
        made.announce(number, samples)
    return made


def test_a_mask_belongs_to_the_sample_whoever_its_neighbours_are() -> None:
    alone = clock((0, (7,))).mask("m", 8, 4, 0.5)
    among = clock((0, (3, 7))).mask("m", 12, 4, 0.5)
    assert torch.equal(alone[:, 0], among[:8, 1])
    assert not torch.equal(among[:, 0], among[:, 1])
    assert not torch.equal(alone, clock((0, (7,))).mask("other", 8, 4, 0.5))


def test_a_recomputed_micro_batch_sees_its_own_mask_again() -> None:
    """1F1B runs micro-batch 1 forward before it goes back through micro-batch 0."""
    made = clock((0, (1, 2)))
    first, state = made.mask("m", 8, 4, 0.5), torch.get_rng_state()
    made.announce(1, (3, 4))
    assert not torch.equal(made.mask("m", 8, 4, 0.5), first)
    torch.set_rng_state(state)  # what activation recompute does
    assert torch.equal(made.mask("m", 8, 4, 0.5), first)


def test_a_mask_keeps_its_share() -> None:
    share = clock((0, tuple(range(50)))).mask("m", 16, 64, 0.9).float().mean()
    assert abs(share - 0.9) < 0.01


def test_numbers_are_of_the_sample_and_the_position_wherever_a_row_is_cut() -> None:
    whole = clock((0, (3, 7))).numbers(8)
    assert whole.shape == (8, 2) and len(set(whole.flatten().tolist())) == 16
    assert torch.equal(whole[:, 1], clock((0, (7,))).numbers(8)[:, 0])
    for part in (0, 1):
        cut = DropoutClock(5, 16, SequenceCut(2, part))
        cut.begin_step()
        cut.announce(0, (3, 7))
        assert torch.equal(cut.numbers(4), SequenceCut(2, part).take(whole, 0))


def test_a_tokens_mask_depends_on_token_module_and_feature_alone() -> None:
    made, numbers, keep = clock((0, (0,))), torch.arange(64) * 1000, 0.7
    whole = made.token_mask("experts.3.up_proj", numbers, range(256), keep)
    assert abs(whole.float().mean() - keep) < 0.02  # of 16,384
    assert (whole.float().mean(dim=0) - keep).abs().max() < 0.3 and (
        whole.float().mean(dim=1) - keep
    ).abs().max() < 0.15
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made.token_mask("experts.3.up_proj", numbers[order], range(128, 256), keep), whole[order, 128:])
    for other in (
        made.token_mask("experts.2.up_proj", numbers, range(256), keep),
        made.token_mask("experts.3.up_proj", numbers + 1, range(256), keep),
        DropoutClock(seed=6, width_tokens=16).token_mask("experts.3.up_proj", numbers, range(256), keep),
    ):
        assert abs((other == whole).float().mean() - (keep**2 + (1 - keep) ** 2)) < 0.02  # as independent ones would
    assert made.token_mask("a", numbers[:0], range(4), keep).shape == (0, 4)
