"""Experts on disk: transformers may store them joined, one 3-D tensor per layer; PEFT 0.21 joins their adapters too.

Joined weights are ``gate_up_proj [experts, 2 ffn, hidden]`` (gate's rows, then up's) and ``down_proj [experts, hidden,
ffn]``. A joined adapter of rank R has A ``[experts * R, in]``, expert by expert, and B ``[out, R * experts]``, where
the column of rank ``j`` and expert ``e`` is ``j * experts + e``. Gate and up share one of rank 2r: their A lie one
under the other, their B on the diagonal.

Not joined, an expert's linears have the names of the hub's files: ``mlp.experts.3.gate_proj``, of Mixtral
``block_sparse_moe.experts.3.w1``. Joined, all families are the same: ``mlp.experts``.

In a model with experts PEFT takes ``gate_proj``, ``up_proj`` and ``down_proj`` in ``target_modules`` for the experts'
alone. Dense layers and shared experts, which have linears of these names too (DeepSeek), are named by their weights in
``target_parameters``, as routers are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from parallel.shards import Box

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
ROUTER = "gate"
MODULE, MIXTRAL_MODULE = "mlp", "block_sparse_moe"
MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
LEAF_OF = {part: leaf for leaf, parts in PARTS.items() for part in parts}
LEAF_OF |= {own: LEAF_OF[part] for own, part in MIXTRAL.items()}
_ONE = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)\.lora_(?P<side>[AB])\.weight")
_JOINED = re.compile(r"(?P<experts>.+\.experts)(?P<inner>\.base_layer)?\.lora_(?P<side>[AB])\.weight")
_ROUTER = re.compile(rf".+\.({MODULE}|{MIXTRAL_MODULE})\.{ROUTER}\.lora_[AB]\.weight")
_WRAPPED = re.compile(rf"(?P<module>.+\.({'|'.join((ROUTER, *LEAF_OF))}))\.lora_[AB]\.weight")
_OF_MIXTRAL = re.compile(
    rf"(?P<before>.+)\.{MIXTRAL_MODULE}\.(?P<path>experts\.\d+\.(?P<leaf>w[123])|{ROUTER})\.(?P<rest>.+)"
)
_PREFIX = "base_model.model."


def weight_places(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Box]]:
    """The logical weights in a joined tensor of experts, each with its box; none where it is no such tensor.

    Example:
        >>> [name for name, _ in weight_places("model.layers.0.mlp.experts.gate_up_proj", (1, 4, 3))]
        ['model.layers.0.mlp.experts.0.gate_proj.weight', 'model.layers.0.mlp.experts.0.up_proj.weight']
    """
    module, _, leaf = key.rpartition(".")
    if len(shape) != 3 or leaf not in PARTS or not module.endswith(".experts"):
        return
    rows = shape[1] // len(PARTS[leaf])
    for expert in range(shape[0]):
        for number, part in enumerate(PARTS[leaf]):
            yield f"{module}.{expert}.{part}.weight", Box((expert, number * rows, 0), (1, rows, shape[2]))


def common_name(name: str) -> str:
    """The name that a tensor of Mixtral would have in a family that names experts by what they do; others as they are.

    Example:
        >>> common_name("model.layers.0.block_sparse_moe.experts.3.w3.weight")
        'model.layers.0.mlp.experts.3.up_proj.weight'
    """
    match = _OF_MIXTRAL.fullmatch(name)
    if match is None:
        return name
    path = match["path"]
    if match["leaf"]:
        path = path.removesuffix(match["leaf"]) + MIXTRAL[match["leaf"]]
    return f"{match['before']}.{MODULE}.{path}.{match['rest']}"


@dataclass(frozen=True)
class JoinedHalf:
    """One half (``side`` A or B) of the joined adapter of a layer's ``leaf``, under the ``key`` that PEFT stores.

    ``experts``: the joined module. ``parts``: of every expert the names of the logical halves in it.
    """

    experts: str
    leaf: str
    side: str
    key: str
    parts: tuple[tuple[str, ...], ...]


def has_experts(names: Iterable[str]) -> bool:
    """Whether an adapter holds experts or routers under logical names."""
    return any(_ONE.fullmatch(name) or _ROUTER.fullmatch(name) for name in names)


def joined_halves(names: Iterable[str]) -> tuple[list[JoinedHalf], list[str]]:
    """Which joined halves the logical names of an adapter make.

    PEFT wraps down around gate_up where a layer has both, so that gate_up's key says ``base_layer``.

    Returns:
        The halves, and the names that are no experts'.
    """
    found: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    rest = []
    for name in names:
        match = _ONE.fullmatch(common_name(name))
        if match is None:
            rest.append(name)
        else:
            leaf = LEAF_OF[match["leaf"]]
            place = (int(match["number"]), PARTS[leaf].index(match["leaf"]))
            found.setdefault((match["experts"], leaf, match["side"]), {})[place] = name
    halves = []
    for (experts, leaf, side), places in found.items():
        inner = ".base_layer" if leaf == "gate_up_proj" and (experts, "down_proj", side) in found else ""
        ordered, size = [places[place] for place in sorted(places)], len(PARTS[leaf])
        parts = tuple(tuple(ordered[start : start + size]) for start in range(0, len(ordered), size))
        halves.append(JoinedHalf(experts, leaf, side, f"{experts}{inner}.lora_{side}.weight", parts))
    return halves, rest


def join(half: JoinedHalf, experts: list[list[torch.Tensor]]) -> torch.Tensor:
    """Join the halves of the parts of all experts as PEFT stores them."""
    if half.side == "A":
        return torch.cat([torch.cat(parts) for parts in experts])
    return torch.stack([torch.block_diag(*parts) for parts in experts], dim=-1).flatten(1)


def loadable_config(config: Mapping[str, Any], adapted: Collection[str]) -> dict[str, Any]:
    """The ``adapter_config.json`` under which PEFT 0.21 loads an adapter of logical experts and routers as it is.

    PEFT joins them while it loads, by the leaves in ``target_modules``, whatever the layer. It takes gate and up for
    the inner adapter always, which they are only if down is a target (without tensors its adapter is zero); and it
    doubles alpha with the rank, which under rsLoRA changes the scale, unless another pattern comes first.

    Args:
        adapted: full paths of the adapted modules.
    """
    leaves = {ROUTER, *LEAF_OF}
    wrapped = {path: path.rpartition(".")[2] for path in adapted if path.rpartition(".")[2] in leaves}
    if not wrapped:
        return dict(config)
    found = {leaf for path, leaf in wrapped.items() if leaf == ROUTER or ".experts." in path}
    beside = sorted(f"{path}.weight" for path, leaf in wrapped.items() if leaf != ROUTER and ".experts." not in path)
    listed = adapted if isinstance(config["target_modules"], str) else config["target_modules"]
    targets = sorted(path for path in listed if path.rpartition(".")[2] not in leaves) + sorted(found)
    for gate, down in (("gate_proj", "down_proj"), ("w1", "w2")):
        if gate in found and down not in found:
            targets.append(down)
    pattern = {r"experts\.gate_up_proj": joined_alpha(config)} if config.get("use_rslora") else {}
    parameters = {"target_parameters": beside} if beside else {}
    return {**config, "target_modules": targets, "alpha_pattern": pattern, **parameters}


def joined_config(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The ``adapter_config.json`` of an adapter whose experts are joined, from that of its logical form.

    Doubling the rank of gate_up asks for twice alpha, or for sqrt(2) times alpha under rsLoRA, so that the scale stays.
    """
    halves, rest = joined_halves(names)
    parameters = {f"{half.experts}.{half.leaf}" for half in halves}
    wrapped = (_WRAPPED.fullmatch(common_name(name)) for name in rest)
    parameters |= {f"{match['module']}.weight" for match in wrapped if match}
    joined = {ROUTER, *LEAF_OF}
    result = {
        **config,
        "target_modules": [name for name in config["target_modules"] if name.rpartition(".")[2] not in joined],
        "target_parameters": sorted(name.removeprefix(_PREFIX) for name in parameters),
    }
    result["alpha_pattern"] = {}
    if any(map(_is_gate_up, parameters)):
        result["rank_pattern"] = {r".*\.gate_up_proj": 2 * config["r"]}
        result["alpha_pattern"] = {r".*\.gate_up_proj": joined_alpha(config)}
    return result


def joined_alpha(config: Mapping[str, Any]) -> float:
    """The alpha that gives gate_up, at twice the rank, the scale of its parts.

    Example:
        >>> joined_alpha({"lora_alpha": 8}), joined_alpha({"lora_alpha": 8, "use_rslora": True})
        (16, 11.313708498984761)
    """
    return float(config["lora_alpha"]) * 2**0.5 if config.get("use_rslora") else 2 * config["lora_alpha"]


@dataclass(frozen=True)
class LogicalHalf:
    """Where a half of a logical expert's adapter lies in a joined tensor.

    Args:
        key: the joined tensor's.
        shape: of the logical half.
        cut: takes it out of the joined tensor.
    """

    key: str
    shape: tuple[int, int]
    cut: Callable[[torch.Tensor], torch.Tensor]


def logical_halves(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> Iterator[tuple[str, LogicalHalf]]:
    """The logical names in an adapter as PEFT joins it, each with its place; what is not joined is left out.

    Args:
        shapes: of every stored tensor.
        config: the stored ``adapter_config.json``.
    """
    for key, shape in shapes.items():
        match = _JOINED.fullmatch(key)
        if match is None:
            continue
        leaf = _leaf(match, shapes, config)
        rank = pattern_value(config.get("rank_pattern"), f"{match['experts']}.{leaf}", config["r"])
        side, parts = match["side"], PARTS[leaf]
        count, r = (shape[0] if side == "A" else shape[1]) // rank, rank // len(parts)
        for expert in range(count):
            for number, part in enumerate(parts):
                place = _Place(count, rank, expert, number, len(parts))
                half = (r, shape[1]) if side == "A" else (shape[0] // len(parts), r)
                cut = place.cut_a if side == "A" else place.cut_b
                yield f"{match['experts']}.{expert}.{part}.lora_{side}.weight", LogicalHalf(key, half, cut)


@dataclass(frozen=True)
class _Place:
    experts: int
    rank: int
    expert: int
    number: int
    parts: int

    def cut_a(self, joined: torch.Tensor) -> torch.Tensor:
        r = self.rank // self.parts
        return joined[self.expert * self.rank + self.number * r :][:r]

    def cut_b(self, joined: torch.Tensor) -> torch.Tensor:
        r, rows = self.rank // self.parts, joined.shape[0] // self.parts
        mine = joined.unflatten(1, (self.rank, self.experts))[..., self.expert]
        return mine[self.number * rows :][:rows, self.number * r :][:, :r]


def is_block_diagonal(joined_b: torch.Tensor, rank: int) -> bool:
    """Whether gate and up have B of their own in a joined B ``[2 ffn, rank * experts]``."""
    blocks = joined_b.unflatten(1, (rank, -1)).unflatten(0, (2, -1)).unflatten(2, (2, -1))
    return not blocks[0, :, 1].any() and not blocks[1, :, 0].any()


def logical_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``adapter_config.json`` of the logical form of a joined adapter: gate's and up's alpha for half the rank."""
    own = {key: value for key, value in (config.get("alpha_pattern") or {}).items() if "gate_up_proj" not in key}
    joined = pattern_value(config.get("alpha_pattern"), "experts.gate_up_proj", config["lora_alpha"])
    alpha = joined / (2**0.5 if config.get("use_rslora") else 2)
    parameters = config.get("target_parameters") or []
    parts = dict.fromkeys(PARTS["gate_up_proj"], alpha) if any(map(_is_gate_up, parameters)) else {}
    unknown = [name for name in parameters if name.rpartition(".")[2] not in PARTS and not _is_wrapped(name)]
    return {**config, "target_parameters": unknown or None, "alpha_pattern": {**parts, **own}}


def pattern_value(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """What PEFT's ``rank_pattern`` or ``alpha_pattern`` says of a module: the first that matches the end of its name.

    Example:
        >>> pattern_value({"q_proj": 2}, "layers.0.q_proj", 4), pattern_value({}, "layers.0.q_proj", 4)
        (2, 4)
    """
    matching = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matching, otherwise)


def _leaf(match: re.Match[str], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str:
    """Which joined weight an adapter's key means: with both, gate_up lies inside of down."""
    if match["inner"]:
        return "gate_up_proj"
    if f"{match['experts']}.base_layer.lora_{match['side']}.weight" in shapes:
        return "down_proj"
    return "gate_up_proj" if any(map(_is_gate_up, config.get("target_parameters") or [])) else "down_proj"


def _is_gate_up(parameter: str) -> bool:
    return parameter.rpartition(".")[2] == "gate_up_proj"


def _is_wrapped(parameter: str) -> bool:
    """Whether it is the weight of a router, or of a linear that has the name of an expert's."""
    module, _, kind = parameter.rpartition(".")
    return kind == "weight" and module.rpartition(".")[2] in (ROUTER, *LEAF_OF)
