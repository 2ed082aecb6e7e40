"""Training data: files to chat messages, messages to cached tokens, tokens to the micro-batches of a step."""

from orchestrator.data.batches import BatchShape, SampleOrder, step_microbatches
from orchestrator.data.preparing import prepare
from orchestrator.data.store import DataSummary, SkippedRows, TokenisedData

__all__ = ["BatchShape", "DataSummary", "SampleOrder", "SkippedRows", "TokenisedData", "prepare", "step_microbatches"]
