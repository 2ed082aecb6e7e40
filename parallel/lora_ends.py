"""LoRA and DoRA on the ends of a model: its output layer and its embedding.

The output layer is a linear like others, cut over the vocabulary by rows. An embedding ``[vocab, hidden]`` is cut over
the vocabulary too, but PEFT's DoRA takes it for the linear ``[hidden, vocab]`` that it is to a token: there is one
magnitude for each *column*, whose length goes over the whole vocabulary, so that ranks add up their rows' shares:

    y = m / |V| * (W[token] + s B A[:, token]), with |V| = |W^T + s B A| row by row of [hidden, vocab].
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from parallel import names
from parallel.dora import BLOCK_ROWS, DoraLinear
from parallel.lora import LoraContext, LoraLinear, LoraPart, mark
from parallel.loss import HeadAdapter
from parallel.seeding import normal

Weight = Callable[[], torch.Tensor]


class _Rows(torch.nn.Module):
    """The output layer's rows on this rank, without padding, as an adapter's base."""

    def __init__(self, weight: Weight, rows: int) -> None:
        super().__init__()
        self._whole, self._rows = weight, rows

    @property
    def weight(self) -> torch.Tensor:
        """``[rows, hidden]``."""
        return self._whole()[: self._rows]


class LoraHead(LoraLinear):
    """The adapter of the output layer, whose logits are made by the loss (:func:`parallel.loss.summed_loss`)."""

    def __init__(self, context: LoraContext, weight: Weight) -> None:
        """``weight``: gives this rank's rows of the output layer, with padding."""
        rows = names.vocab_piece(names.HEAD, context.model, context.tp, context.tp_rank).box.size[0]
        super().__init__(_Rows(weight, rows), None, names.HEAD_LINEAR, context)
        self.widths = dict.fromkeys(self.widths, rows)  # they may not divide

    def of(self, hidden: torch.Tensor) -> HeadAdapter:
        """What is added to the logits of all tokens, in this rank's rows.

        Args:
            hidden: as the last layer leaves it: this rank's tokens under sequence parallelism.
        """
        low = self._reduce(self._project(hidden))
        return HeadAdapter(low, self._up(low.dtype))


class DoraHead(LoraHead, DoraLinear):
    """The same with a magnitude for each row of the output layer."""

    def of(self, hidden: torch.Tensor) -> HeadAdapter:
        """What is added to the logits of all tokens, and by how much each is stretched, in this rank's rows."""
        factor = self._factor()
        if not (self.context.lora.dropout and self.training):
            low = self._reduce(self._project(hidden))
            return HeadAdapter(low, self._up(low.dtype), factor)
        [part] = self._parts()
        dropped = self._drop(hidden, part)
        low = self._reduce(torch.nn.functional.linear(dropped, part.down().to(hidden.dtype)))
        return HeadAdapter(low, self._up(low.dtype), factor, self._reduce(dropped))


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
        if context.lora.dora:
            self.magnitude = torch.nn.Parameter(torch.ones(context.model.hidden))
            self.pieces += (names.embedding_magnitude_piece(context.model),)
            mark(self.magnitude, names.HEAD_LINEAR, False, context.sequence_parallel)


class LoraEmbedding(torch.nn.Module):
    """The adapter of the embedding, whose rows are cut over tensor-parallel ranks."""

    def __init__(self, context: LoraContext, weight: Weight) -> None:
        """``weight``: gives this rank's rows of the embedding, with padding."""
        super().__init__()
        self.part = EmbeddingPart(context)
        self.context = context
        self.weight = weight

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
        return embedded + torch.nn.functional.linear(low, self.up()).to(embedded.dtype)

    def up(self) -> torch.Tensor:
        """The scaled B."""
        return self.part.B * self.context.lora.scale


class DoraEmbedding(LoraEmbedding):
    """The same with a magnitude for each column; :meth:`start` fills these once the embedding has its weights."""

    square: torch.Tensor

    @torch.no_grad()
    def start(self) -> None:
        """Set every magnitude to the length of its column of W; all tensor-parallel ranks call it."""
        blocks = self._rows().split(BLOCK_ROWS)
        empty = self.part.B.new_zeros(len(self.part.B))
        self.register_buffer("square", sum((rows.float().square().sum(dim=0) for rows in blocks), empty), False)
        self._magnitude().copy_(self._whole(self.square).sqrt())

    def forward(self, tokens: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """What is embedded and adapted, its columns stretched; in fp32, and back in the type of ``embedded``."""
        adapted = super().forward(tokens, embedded)
        return (adapted * (self._magnitude() / self._lengths())).to(adapted.dtype)

    @torch.no_grad()
    def _lengths(self) -> torch.Tensor:
        """``|W^T + s B A|`` of every row ``[hidden]``; a constant, in fp32."""
        down, up = self.part.A, self.up()
        columns = zip(self._rows().split(BLOCK_ROWS), down.split(BLOCK_ROWS, dim=1), strict=True)
        crossed = sum((rows.float().t() @ each.t() for rows, each in columns), torch.zeros_like(up))
        square = self.square + ((2 * crossed + up @ (down @ down.t())) * up).sum(dim=1)
        return self._whole(square).clamp_(min=0).sqrt_()

    def _whole(self, square: torch.Tensor) -> torch.Tensor:
        return self.context.regions.reduce(square.clone()) if self.context.tp > 1 else square.clone()

    def _rows(self) -> torch.Tensor:
        """This rank's rows of the embedding, without padding."""
        return self.weight().detach()[: self.part.pieces[0].box.size[1]]

    def _magnitude(self) -> torch.nn.Parameter:
        assert self.part.magnitude is not None
        return self.part.magnitude
