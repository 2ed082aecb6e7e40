"""Which attention a layer gets: transformer-engine's where it is installed and can, ours everywhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from parallel import provider
from parallel.attention import SdpaAttention


@pytest.mark.parametrize(
    ("cp", "kind", "groups", "tp", "ours"),
    [
        (1, "p2p", 3, 1, False),
        (2, "p2p", 3, 1, False),
        (2, "a2a", 4, 1, False),
        (2, "a2a", 3, 1, True),
        (2, "a2a", 4, 4, True),
    ],
)
def test_ours_stays_where_transformer_engine_would_refuse(
    monkeypatch: pytest.MonkeyPatch, cp: int, kind: str, groups: int, tp: int, ours: bool
) -> None:
    """Its all-to-all deals out key/value heads, and refuses those that the ranks do not divide."""
    config = SimpleNamespace(
        num_query_groups=groups, tensor_model_parallel_size=tp, context_parallel_size=cp, cp_comm_type=kind
    )
    monkeypatch.setattr(provider, "find_spec", lambda name: object())
    chosen = provider.provider(config, "cuda")
    assert isinstance(chosen, provider.TransformerEngineSpecProvider)
    assert chosen._own_attention == ours
    if ours:
        assert chosen.core_attention() is SdpaAttention
    assert provider.provider(config, "cpu").core_attention() is SdpaAttention


def test_without_transformer_engine_everything_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "find_spec", lambda name: None)
    config = SimpleNamespace()
    assert type(provider.provider(config, "cuda")) is provider.IsotrainSpecProvider
