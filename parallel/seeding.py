"""Randomness that does not know the topology: every stream is keyed by what it is for, never by a rank."""

from __future__ import annotations

import hashlib

import torch

from parallel.sequence import SequenceCut

_MASK = (1 << 63) - 1
_STEP = -7046029254386353131  # 2^64 / golden ratio as a signed number: what splitmix64 counts by
_UNIT_BITS = 24  # of a float32 between 0 and 1


def derive_seed(*key: object) -> int:
    """A 63-bit seed from a key such as ``(seed, "lora_A", tensor name)``; equal keys give equal seeds everywhere.

    Example:
        >>> derive_seed(1, "a") == derive_seed(1, "a"), derive_seed(1, "a") == derive_seed(2, "a")
        (True, False)
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") & _MASK


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*key))


def kaiming_uniform(shape: tuple[int, int], *key: object) -> torch.Tensor:
    """Uniform in ``±1/sqrt(fan_in)``, as ``torch.nn.Linear`` and PEFT initialise LoRA's A (Kaiming with a = sqrt(5)).

    Returns:
        fp32 ``[out, in]`` on the CPU.
    """
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(*key))


def normal(shape: tuple[int, ...], std: float, *key: object) -> torch.Tensor:
    """fp32 normal with mean 0 on the CPU."""
    return torch.empty(shape).normal_(0.0, std, generator=generator(*key))


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """splitmix64's mixer (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") of int64."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)


def uniform_at(key: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A number between 0 and 1 for each pair of a row and a column, which depends on the key and these two alone.

    Args:
        rows, columns: int64, one axis each.
    Returns:
        fp32 ``[rows, columns]``.
    Example:
        >>> one = uniform_at(3, torch.tensor([7, 9]), torch.arange(4))
        >>> torch.equal(one[1:, 2:], uniform_at(3, torch.tensor([9]), torch.tensor([2, 3])))
        True
    """
    bits = _mixed(_mixed(rows + key)[:, None] + columns * _STEP)
    return (bits >> 64 - _UNIT_BITS & (1 << _UNIT_BITS) - 1).float() / (1 << _UNIT_BITS)


class DropoutClock:
    """Tells dropout which samples are being computed, so that masks follow samples and not ranks.

    The engine announces each micro-batch; its number becomes the seed of torch's default generator, which activation
    recompute saves and restores: a recomputed forward pass therefore sees its own micro-batch again, also when a
    pipeline schedule has moved on to another one.
    """

    def __init__(self, seed: int, width_tokens: int, cut: SequenceCut | None = None) -> None:
        """``width_tokens``: of the longest whole row; ``cut``: which of a row's tokens are computed here."""
        self._seed = seed
        self._cut = cut or SequenceCut()
        self._width = width_tokens
        self._samples: dict[int, tuple[int, ...]] = {}

    def begin_step(self) -> None:
        """Forget the micro-batches of the last step."""
        self._samples.clear()

    def announce(self, number: int, sample_ids: tuple[int, ...]) -> None:
        """From now on micro-batch ``number`` (0-based in this step) with these samples is computed."""
        self._samples[number] = sample_ids
        torch.manual_seed(number)

    def mask(self, module: str, tokens: int, features: int, keep: float) -> torch.Tensor:
        """Which elements stay, for the micro-batch in hand.

        Args:
            tokens: of each row on this context-parallel rank.
        Returns:
            bool ``[tokens, samples, features]``; a sample's mask depends on the seed, the sample, the module's name
            and nothing else (padding and neighbours do not change it).
        """
        samples = self._samples[torch.initial_seed()]
        whole = tokens * self._cut.size
        rows = [
            torch.rand(self._width, features, generator=generator(self._seed, "dropout", module, sample))[:whole]
            for sample in samples
        ]
        return self._cut.take(torch.stack(rows, dim=1), 0) < keep

    def numbers(self, tokens: int) -> torch.Tensor:
        """Which token of the run each one of the micro-batch in hand is.

        Args:
            tokens: of each row on this context-parallel rank.
        Returns:
            int64 ``[tokens, samples]``, all different in a run.
        """
        samples = torch.tensor(self._samples[torch.initial_seed()])
        positions = self._cut.take(torch.arange(tokens * self._cut.size), 0)
        return positions[:, None] + samples * self._width

    def token_mask(self, module: str, numbers: torch.Tensor, features: range, keep: float) -> torch.Tensor:
        """Which elements of tokens stay that have left their rows, as experts' have.

        Args:
            numbers: of these tokens, by :meth:`numbers` of whichever rank they come from.
            features: of the module's input, those that are here.
        Returns:
            bool ``[tokens, features]``.
        """
        columns = torch.arange(features.start, features.stop, device=numbers.device)
        return uniform_at(derive_seed(self._seed, "dropout", module), numbers, columns) < keep
