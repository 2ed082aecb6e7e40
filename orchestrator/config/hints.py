"""What a user probably meant: near keys, and the names that other trainers have for ours."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from orchestrator.errors import ConfigError

# The same thing's name in transformers, TRL, LLaMA-Factory, ms-swift, axolotl and Megatron-LM.
ELSEWHERE = {
    "run_dir": ("output_dir", "out_dir", "save_dir", "save", "output", "out"),
    "steps": ("max_steps", "train_iters", "num_steps", "iterations", "num_train_epochs", "epochs", "max_epochs"),
    "precision": ("bf16", "fp16", "fp32", "dtype", "torch_dtype"),
    "seed": ("random_seed", "data_seed"),
    "model.path": ("model_name_or_path", "model_name", "model_id", "base_model", "hf_model", "load", "model_path"),
    "data.path": ("dataset", "datasets", "train_file", "data_path", "dataset_path", "train_data", "dataset_name"),
    "batch.global_sequences": ("global_batch_size", "train_batch_size", "batch_size", "gradient_accumulation_steps"),
    "batch.micro_sequences": ("micro_batch_size", "per_device_train_batch_size", "per_device_batch_size"),
    "batch.sequence_tokens": (
        *("max_length", "max_seq_length", "max_seq_len", "seq_length", "sequence_len", "cutoff_len", "seq_len"),
        "model_max_length",
    ),
    "tuner.r": ("lora_rank", "lora_r", "rank", "lora_dim"),
    "tuner.alpha": ("lora_alpha",),
    "tuner.dropout": ("lora_dropout",),
    "tuner.targets": ("target_modules", "lora_target", "lora_target_modules"),
    "tuner.rslora": ("use_rslora",),
    "tuner.path": ("adapter_name_or_path", "adapters", "resume_adapter", "peft_path", "lora_path"),
    "optimizer.lr": ("learning_rate",),
    "optimizer.clip_norm": ("max_grad_norm", "gradient_clipping", "clip_grad", "grad_clip"),
    "optimizer.schedule": ("lr_scheduler_type", "lr_scheduler", "lr_decay_style", "scheduler"),
    "optimizer.warmup_steps": ("warmup", "warmup_ratio", "lr_warmup_iters", "num_warmup_steps"),
    "optimizer.eps": ("adam_epsilon", "adam_eps"),
    "optimizer.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.distributed": ("use_distributed_optimizer", "zero_stage"),
    "checkpoint.every_steps": ("save_steps", "save_interval", "save_every"),
    "checkpoint.keep_last": ("save_total_limit", "keep"),
    "checkpoint.asynchronous": ("async_save", "async_mode"),
    "recovery.restarts": ("max_restarts", "restarts"),
    "recovery.silent_s": ("silent_s", "heartbeat_timeout", "rank_heartbeat_timeout"),
    "recovery.stalled_s": ("stalled_s", "distributed_timeout_minutes", "ddp_timeout"),
    "metrics.sinks": ("report_to", "loggers"),
    "memory.recompute": ("gradient_checkpointing", "activation_checkpointing", "recompute_granularity"),
    "topology.tp": ("tensor_model_parallel_size", "tensor_parallel_size", "tp_size"),
    "topology.pp": ("pipeline_model_parallel_size", "pipeline_parallel_size", "pp_size"),
    "topology.vpp": ("virtual_pipeline_model_parallel_size",),
    "topology.cp": ("context_parallel_size", "cp_size", "ring_degree"),
    "topology.ep": ("expert_model_parallel_size", "expert_parallel_size", "ep_size"),
    "topology.etp": ("expert_tensor_parallel_size",),
    "topology.dp": ("data_parallel_size", "dp_size"),
    "topology.sp": ("sequence_parallel",),
    "cluster.gpus_per_node": ("nproc_per_node", "num_gpus", "n_gpus", "num_processes"),
    "cluster.nodes": ("nodes", "nnodes", "num_nodes", "num_machines"),
}
# Ours count or mean something else, so that the value cannot be carried over.
OTHER_VALUES = {
    *("num_train_epochs", "epochs", "max_epochs", "bf16", "fp16", "fp32", "torch_dtype", "dtype"),
    *("gradient_accumulation_steps", "warmup_ratio", "adam_beta1", "adam_beta2", "zero_stage", "report_to"),
    *("gradient_checkpointing", "activation_checkpointing", "recompute_granularity", "target_modules", "lora_target"),
    "distributed_timeout_minutes",
    *("lora_target_modules", "lr_scheduler_type", "lr_decay_style", "lr_scheduler", "adapters", "datasets"),
}


# What others call a tuner and is a setting of one here.
SETTINGS = {
    ("tuner", "rslora"): "tuner=lora tuner.rslora=true",
    ("tuner", "loraplus"): "tuner=lora tuner.loraplus_lr_ratio=16",
    ("tuner", "lora_plus"): "tuner=lora tuner.loraplus_lr_ratio=16",
    ("tuner", "freeze"): "tuner=full tuner.freeze=[embed_tokens]",
}


def unknown_key(key: str, keys: Sequence[str], groups: Collection[str] = (), value: str = "VALUE") -> ConfigError:
    """The error for a key that no job has; the hint is what was probably meant, with the value that was given.

    Args:
        key: as typed, dotted.
        keys: every key of a job.
        groups: names that take ``GROUP=CHOICE``.
        value: as typed.
    Example:
        >>> unknown_key("learning_rate", ["optimizer.lr"], value="1e-4").hint
        'optimizer.lr=1e-4'
    """
    last = key.rpartition(".")[2].lstrip("-").replace("-", "_").lower()
    for known, names in ELSEWHERE.items():
        if last in names and known in keys:
            typed = "VALUE" if last in OTHER_VALUES else value
            if known == "precision" and last in ("bf16", "fp32") and value.lower() == "true":
                typed = last
            return ConfigError(f"unknown key {key!r}; here it is {known!r}", f"{known}={typed}")
    near = difflib.get_close_matches(key, [*keys, *groups], n=1, cutoff=0.6)
    if not near:  # perhaps the section is missing or wrong: lr instead of optimizer.lr
        near = [known for known in keys if known.rpartition(".")[2] == last][:1]
    if near:
        return ConfigError(f"unknown key {key!r}; the nearest is {near[0]!r}", f"{near[0]}={value}")
    section = key.partition(".")[0]
    siblings = [known for known in keys if known.startswith(f"{section}.")] or [
        known for known in keys if "." not in known
    ]
    return ConfigError(f"unknown key {key!r}; there are {', '.join(siblings)}", f"{siblings[0]}=VALUE")
