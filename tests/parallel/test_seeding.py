"""Randomness is keyed by purpose, sample and name; nothing in it knows a rank."""

from __future__ import annotations

import torch

from parallel.seeding import DropoutClock, derive_seed, kaiming_uniform, normal


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
