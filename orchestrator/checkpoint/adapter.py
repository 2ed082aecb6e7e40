"""PEFT's LoRA adapter folders, read and described without importing PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.hf_reader import AdapterReader
from orchestrator.config.job import TunerConfig
from orchestrator.errors import ConfigError
from parallel.names import EMBEDDING_MODULE

PREFIX = "base_model.model."
OURS = "ISOTRAIN_LORA"
"""``peft_type`` of an adapter with DoRA or dropout on experts or routers: PEFT has no place for it, and says so then.
Under PEFT's own type it would load the rest, with no error."""
MATRIX = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<half>[AB])|(?P<length>magnitude_vector))"
)
# Settings of adapter_config.json under which a merge means something else than W + scale * B @ A.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None, True),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian"),  # pissa, olora, loftq, ... change the base as well
}


@dataclass(frozen=True)
class LoraPair:
    """The update of one base weight: ``scale * B @ A`` with A ``[r, in]`` and B ``[out, r]``, by their names.

    ``magnitude``: DoRA's lengths ``[out]`` of the rows of ``W + scale * B @ A``, by their name; None for plain LoRA.
    ``transposed``: of an embedding ``[vocab, hidden]``, whose update is ``scale * (B @ A)^T`` with A ``[r, vocab]``.
    Its magnitudes ``[hidden]`` are its columns' lengths.
    """

    base: str
    a: str
    b: str
    scale: float
    magnitude: str | None = None
    transposed: bool = False


def adapter_config(
    tuner: TunerConfig, target_modules: str | Sequence[str], base_model_path: str, tied_embeddings: bool = False
) -> dict[str, Any]:
    """The ``adapter_config.json`` that makes PEFT load our adapter as it was trained.

    Args:
        target_modules: names of modules (or their last parts), or a regular expression of whole names.
        base_model_path: what PEFT's ``AutoPeftModel`` would load the base from.
        tied_embeddings: whether the model's head is its embedding: PEFT would part them, where the embedding learns.
    Example:
        >>> config = adapter_config(TunerConfig(r=8, alpha=16.0), ["q_proj", "k_proj"], "base")
        >>> config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]
        ('LORA', 8, 16, ['k_proj', 'q_proj'])
    """
    # PiSSA's base is the whole one here, so its start is subtracted by a second half of each matrix: rank 2 r.
    halves = 2 if tuner.init == "pissa" else 1
    alpha = tuner.alpha * (halves**0.5 if tuner.rslora else halves)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_path,
        "inference_mode": True,
        "r": halves * tuner.r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": tuner.dropout,
        "use_rslora": tuner.rslora,
        "target_modules": target_modules if isinstance(target_modules, str) else sorted(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": sorted(tuner.modules_to_save) or None,
        **({"ensure_weight_tying": True} if tied_embeddings and _saves_embedding(tuner) else {}),  # older PEFT lacks it
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": tuner.dora,
    }


def _saves_embedding(tuner: TunerConfig) -> bool:
    return any(EMBEDDING_MODULE.endswith(module) for module in tuner.modules_to_save)


def lora_scale(config: Mapping[str, Any], module: str, r: int) -> float:
    """What ``B @ A`` is multiplied with: alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv:2312.03732).

    ``alpha_pattern`` maps regular expressions, matched at the end of a module's name, to other alphas.

    Example:
        >>> lora_scale({"lora_alpha": 32, "use_rslora": True}, "layers.0.q_proj", 16)
        8.0
        >>> lora_scale({"lora_alpha": 32, "alpha_pattern": {"q_proj": 8}}, "layers.0.q_proj", 16)
        0.5
    """
    alpha = float(config.get("lora_alpha", 8))
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(other)
            break
    return float(alpha / (r**0.5 if config.get("use_rslora") else r))


def lora_pairs(adapter: AdapterReader, folder: Path) -> dict[str, LoraPair]:
    """The updates of an adapter by the base weight's name (``model.layers.0.self_attn.q_proj.weight``).

    Raises:
        ConfigError: the adapter is neither LoRA nor DoRA on linear layers and the embedding (trained biases, whole
            modules), or a matrix lacks its partner or, of DoRA, its magnitudes.
    """
    config = adapter.config
    kind = config.get("peft_type")
    if kind not in ("LORA", OURS):
        raise ConfigError(f"{folder} is an adapter of type {kind!r}, only 'LORA' is supported")
    for key, plain in PLAIN.items():
        if key in config and config[key] not in plain:
            raise ConfigError(f"{folder} has {key}={config[key]!r}, only plain LoRA is supported", "merge it with PEFT")
    modules: dict[str, dict[str, str]] = {}
    saved = set(saved_tensors(adapter, folder).values())
    for name in (name for name in adapter.names if name not in saved):
        match = MATRIX.fullmatch(name)
        if match is None and name.endswith(".base_layer.weight"):
            raise ConfigError(
                f"{folder} holds {name}, a whole weight of the base that PEFT saved beside its adapter",
                "save it again in PEFT with save_pretrained(FOLDER, save_embedding_layers=False)",
            )
        if match is None:
            raise ConfigError(f"{folder} holds {name}, which is no LoRA matrix of a linear layer", "merge it with PEFT")
        modules.setdefault(match["module"], {})[match["side"] or match["half"] or "magnitude"] = name
    pairs = {}
    for module, sides in modules.items():
        _check_complete(module, sides, bool(config.get("use_dora")), folder)
        inner = module.removeprefix(PREFIX)
        scale = lora_scale(config, inner, adapter.shape(sides["A"])[0])
        pairs[f"{inner}.weight"] = LoraPair(
            f"{inner}.weight", sides["A"], sides["B"], scale, sides.get("magnitude"), "embedding_A" in sides["A"]
        )
    return pairs


def saved_tensors(adapter: AdapterReader, folder: Path) -> dict[str, str]:
    """Whole weights of an adapter (``modules_to_save``): the base weight's name to the name in the adapter's file.

    Raises:
        ConfigError: a module that the configuration names has no weight there.
    """
    modules = list(adapter.config.get("modules_to_save") or [])
    tied = ["lm_head"] if adapter.config.get("ensure_weight_tying") else []  # PEFT writes the embedding as head again
    found = {}
    for name in adapter.names:
        inner = name.removeprefix(PREFIX)
        if MATRIX.fullmatch(name) is None and inner.rpartition(".")[0].endswith((*modules, *tied)):
            found[inner] = name
    for module in modules:
        if not any(name.rpartition(".")[0].endswith(module) for name in found):
            raise ConfigError(f"{folder} has modules_to_save={modules}, but no weight of {module}", "export it again")
    return found


def _check_complete(module: str, sides: Mapping[str, str], is_dora: bool, folder: Path) -> None:
    """PEFT starts a magnitude that is missing anew, without an error: the adapter would mean something else."""
    if not {"A", "B"} <= sides.keys():
        raise ConfigError(f"{folder} holds {next(iter(sides.values()))} without its partner")
    if is_dora and "magnitude" not in sides:
        raise ConfigError(
            f"{folder} has use_dora=True, but no {module}.lora_magnitude_vector",
            "export it again: an adapter of DoRA is no adapter without its magnitudes",
        )
    if not is_dora and "magnitude" in sides:
        raise ConfigError(f"{folder} holds {sides['magnitude']}, but has use_dora=False", "set use_dora to true in it")
