"""Randomness that does not know the topology: every stream is keyed by what it is for, never by a rank."""

from __future__ import annotations

import hashlib

import torch

from parallel.sequence import SequenceCut

_MASK = (1 << 63) - 1


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
