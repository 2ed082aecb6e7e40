"""LoRA on the ends of a model: its output layer and its embedding."""

from __future__ import annotations

import torch

from parallel import names
from parallel.lora import LoraContext, LoraLinear, LoraPart, mark
from parallel.seeding import normal


class LoraHead(LoraLinear):
    """The adapter of the output layer, whose logits are made by the loss (:func:`parallel.loss.summed_loss`)."""

    def __init__(self, context: LoraContext) -> None:
        super().__init__(torch.nn.Identity(), None, names.HEAD_LINEAR, context)

    def low_and_up(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``A x`` of all tokens ``[s, b, r]``, and this rank's rows of the scaled B ``[rows, r]``.

        Args:
            hidden: as the last layer leaves it: this rank's tokens under sequence parallelism.
        """
        low = self._reduce(self._project(hidden))
        return low, self._up(low.dtype)


class EmbeddingPart(LoraPart):
    """The two halves of the embedding's adapter: A ``[r, rows of this rank]`` starts at zero, B ``[hidden, r]`` not."""

    def __init__(self, context: LoraContext) -> None:
        torch.nn.Module.__init__(self)
        piece_a, piece_b = names.embedding_adapter_pieces(context.model, context.lora.r, context.tp, context.tp_rank)
        self.A = torch.nn.Parameter(torch.zeros(piece_a.box.size))
        self.B = torch.nn.Parameter(normal(piece_b.shape, 1.0, context.seed, "lora_embedding_B", piece_b.name))
        self.pieces = (piece_a, piece_b)
        self.module_name, self.is_expert = names.EMBEDDING_MODULE, False
        mark(self.A, names.HEAD_LINEAR, True, context.sequence_parallel)
        mark(self.B, names.HEAD_LINEAR, False, context.sequence_parallel)
        self.magnitude = self.fixed_a = self.fixed_b = None


class LoraEmbedding(torch.nn.Module):
    """The adapter of the embedding, whose rows are cut over tensor-parallel ranks."""

    def __init__(self, context: LoraContext) -> None:
        super().__init__()
        self.part = EmbeddingPart(context)
        self.context = context

    def forward(self, tokens: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """What is embedded, plus ``scale * B A[:, token]``.

        Args:
            tokens: ids ``[b, s]``; embedded: ``[s, b, hidden]``, of this rank's tokens under sequence parallelism.
        """
        context, columns = self.context, self.part.pieces[0].box
        here = tokens.t() - columns.offset[1]
        mine = (here >= 0) & (here < columns.size[1])
        rows = torch.nn.functional.embedding(here.clamp(0, columns.size[1] - 1), self.part.A.t())
        low = rows * mine.unsqueeze(-1)
        if context.tp > 1:
            low = (context.regions.scatter if context.sequence_parallel else context.regions.reduce)(low)
        return embedded + torch.nn.functional.linear(low, self.part.B * context.lora.scale).to(embedded.dtype)
