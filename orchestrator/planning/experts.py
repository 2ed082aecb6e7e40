"""What a job asks of experts: what cannot be, and what makes a run depend on how its batch is cut."""

from __future__ import annotations

from orchestrator.config.job import AUTO, ExpertsConfig, JobConfig
from orchestrator.errors import ConfigError
from parallel.specs import ModelSpec


def check_experts(job: JobConfig, model: ModelSpec) -> None:
    """Refuse what is asked of experts where there are none, or none such.

    Raises:
        ConfigError: says which key, and what to type instead.
    """
    experts = job.experts
    if not model.is_moe:
        _check_dense(experts)
    if job.batch.micro_sequences == AUTO and (cut := dependence_on_cut(experts)):
        raise ConfigError(f"batch.micro_sequences=auto changes the run: {cut[0]}", "batch.micro_sequences=1")
    if rate := experts.bias_rate:
        if model.routing is None or not model.routing.bias:
            raise ConfigError(
                f"experts.bias_rate={rate:g} moves biases of the choice of experts, which a {model.family} model has "
                "none of",
                "experts.bias_rate=0",
            )
        if job.tuner.name != "full":
            raise ConfigError(
                f"experts.bias_rate={rate:g} needs tuner=full: an adapter's checkpoint holds no biases of routers",
                "experts.bias_rate=0",
            )


def _check_dense(experts: ExpertsConfig) -> None:
    asked = {
        "balancing_loss": experts.balancing_loss or None,
        "balancing_over": None if experts.balancing_over == ExpertsConfig().balancing_over else experts.balancing_over,
        "capacity_factor": experts.capacity_factor,
    }
    usual = {"balancing_loss": "null", "balancing_over": "sequence", "capacity_factor": "null"}
    for key, value in asked.items():
        if value is not None:
            raise ConfigError(
                f"experts.{key}={value} needs experts, but the model is dense", f"experts.{key}={usual[key]}"
            )


def dependence_on_cut(experts: ExpertsConfig) -> list[str]:
    """What makes a run another one when its micro-batches or its topology change, a line each.

    Example:
        >>> dependence_on_cut(ExpertsConfig(capacity_factor=1.25))
        ['experts.capacity_factor=1.25: tokens are dropped by what shares a rank, so the run depends on how it is cut']
    """
    lines = []
    if experts.balancing_over == "micro_batch":
        lines.append(
            "experts.balancing_over=micro_batch: the loss is of sequences that share a micro-batch, so the run depends "
            "on micro_sequences and dp"
        )
    if experts.capacity_factor is not None:
        lines.append(
            f"experts.capacity_factor={experts.capacity_factor:g}: tokens are dropped by what shares a rank, so the "
            "run depends on how it is cut"
        )
    return lines
