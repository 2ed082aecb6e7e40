"""What a job's tuner means for its model, found out before anything is started."""

from __future__ import annotations

from orchestrator.config.job import JobConfig, TunerConfig
from orchestrator.errors import ConfigError
from parallel.names import EMBEDDING_MODULE, HEAD_MODULE, TargetError, leaf_names, resolve_targets
from parallel.selection import frozen_weights, rate_ratios, saved_weights, weight_shapes
from parallel.specs import ModelSpec


def adapted_linears(job: JobConfig, model: ModelSpec) -> frozenset[str]:
    """Paths of the linears that get an adapter; none in full tuning.

    Raises:
        ConfigError: ``tuner.targets`` names nothing, or what this kind of adapter cannot sit on.
    """
    if job.tuner.name == "full":
        return frozenset()
    try:
        adapted = resolve_targets(job.tuner.targets, model)
    except TargetError as error:
        raise ConfigError(str(error), error.hint) from error
    _check_special(job, model, adapted)
    return adapted


def chosen_weights(job: JobConfig, model: ModelSpec) -> frozenset[str]:
    """Names of the weights that full tuning leaves as they are, or that learn whole beside an adapter.

    Raises:
        ConfigError: a pattern fits nothing, or parts a fused linear.
    """
    try:
        if job.tuner.name != "full":
            return saved_weights(job.tuner.modules_to_save, model)
        rate_ratios(job.optimizer.lr_ratios, model)
        return frozen_weights(job.tuner.freeze, model)
    except TargetError as error:
        raise ConfigError(str(error), error.hint) from error


def beyond_peft(tuner: TunerConfig, adapted: frozenset[str], model: ModelSpec) -> str:
    """What of an adapter PEFT has no place for, in words; empty where it can hold all.

    It wraps experts and routers by their weights (``target_parameters``), with neither DoRA nor dropout, and takes
    every linear that has an expert's name for one (a dense layer's of DeepSeek).
    """
    asked = {"DoRA": tuner.dora, "dropout": tuner.dropout > 0}
    of_experts = set(leaf_names(model)) - set(leaf_names(model, experts=False))
    if not any(path.rpartition(".")[2] in of_experts for path in adapted):
        return ""
    words = " and ".join(word for word, is_asked in asked.items() if is_asked)
    return f"{words} on experts and routers" if words else ""


def _check_special(job: JobConfig, model: ModelSpec, adapted: frozenset[str]) -> None:
    """What PEFT does not define for an embedding; PiSSA's rank is at most that of the weights."""
    tuner = job.tuner
    ratio = tuner.loraplus_lr_ratio
    asked = [
        ("tuner.init=pissa", tuner.init == "pissa", "PEFT starts an embedding's adapter at zero whatever is asked"),
        (f"tuner.loraplus_lr_ratio={ratio:g}", ratio != 1, "PEFT gives embeddings a rate of their own in LoRA+"),
    ]
    for setting, is_asked, reason in asked:
        if is_asked and EMBEDDING_MODULE in adapted:
            linears = [*leaf_names(model), *(["lm_head"] if HEAD_MODULE in adapted else [])]
            raise ConfigError(
                f"{setting} is not defined for {EMBEDDING_MODULE}, which tuner.targets names: {reason}",
                f"tuner.targets=[{','.join(linears)}]",
            )
    twice = sorted(adapted & {name.removesuffix(".weight") for name in chosen_weights(job, model)})
    if twice:
        raise ConfigError(
            f"tuner.targets and tuner.modules_to_save both name {twice[0]}: it learns whole, or by an adapter",
            "tuner.modules_to_save=[]",
        )
    if tuner.init == "pissa":
        shapes = weight_shapes(model)
        smallest = min(adapted, key=lambda path: (min(shapes[f"{path}.weight"]), path))
        if tuner.r > (most := min(shapes[f"{smallest}.weight"])):
            raise ConfigError(
                f"tuner.init=pissa needs tuner.r={tuner.r} singular values, but {smallest} has {most}",
                f"tuner.r={most}",
            )
