"""What a model and a cluster are, as plain values: no weights, no torch, no process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SpecError(ValueError):
    """A config.json that describes no model we know; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for rows longer than a model was first trained on.

    ``kind``: ``linear`` (Chen et al. 2023, arXiv:2306.15595), ``llama3`` (arXiv:2407.21783, section 3.4.3, and the
    reference code of Llama 3.1) or ``yarn`` (Peng et al. 2023, arXiv:2309.00071). Frequencies that turn more than
    ``fast`` times over ``original_positions`` stay, those that turn less than ``slow`` times are divided by ``factor``.
    ``score_factor`` multiplies the attention scores (yarn's temperature).
    """

    kind: str
    factor: float
    original_positions: int = 0
    slow: float = 1.0
    fast: float = 4.0
    whole_turns: bool = True
    score_factor: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder, named as in a Hugging Face ``config.json``.

    Sizes are whole-model sizes (not per rank). ``ffn`` is the width of one dense MLP (gate and up have this many rows
    each); ``expert_ffn`` that of one expert. ``experts == 0`` means a dense model. ``router_aux_loss`` is the
    coefficient of the balancing loss that a run has unless it says otherwise.

    ``windows``: for each layer how many of the last tokens a query sees, its own among them (0: all before it); empty
    where no layer has a window. ``local_rope_theta``: the rotary base of layers with a window, where they have their
    own (0: they have not). ``norm_offset``: norms multiply with ``1 + weight``. ``sandwich_norms``: attention and MLP
    are normed before they are added too. ``embedding_scale`` multiplies embedded tokens. ``score_scale`` multiplies
    the attention scores (0: ``1/sqrt(head_dim)``); ``score_cap`` and ``logit_cap`` bound scores and logits by
    ``cap * tanh(x / cap)`` (0: they do not).
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    normalise_expert_weights: bool = True
    router_aux_loss: float = 0.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0
    windows: tuple[int, ...] = ()
    activation: str = "silu"
    norm_offset: bool = False
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    score_scale: float = 0.0
    score_cap: float = 0.0
    logit_cap: float = 0.0

    @property
    def is_moe(self) -> bool:
        """Whether the MLPs are mixtures of experts."""
        return self.experts > 0

    def window(self, layer: int) -> int:
        """How many tokens a query of this layer (from 0) sees; 0 where it sees all before it."""
        return self.windows[layer] if self.windows else 0


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a Hugging Face folder.

    Raises:
        SpecError: there is no such file, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"{folder} is no model folder: it has no config.json", "model.path=FOLDER") from error
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise SpecError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{path} holds no JSON object")
    return value


@dataclass(frozen=True)
class ClusterSpec:
    """The machines of a run. ``gpus_per_node`` counts ranks per node (processes, on a CPU).

    ``memory_gib`` is what one rank may use: a GPU's memory, or a rank's fair part of the host's.
    """

    name: str
    nodes: int
    gpus_per_node: int
    device: str = "cpu"
    memory_gib: float = 4.0

    @property
    def ranks(self) -> int:
        """How many ranks there are at most."""
        return self.nodes * self.gpus_per_node
