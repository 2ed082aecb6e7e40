"""Supervised fine-tuning: chat messages become tokens, and a mask of those that are learned.

The only file that asks transformers for a tokenizer for training data; it is imported when a data set is tokenised for
the first time, never on a worker that finds the token cache filled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.conversations import BadRow, Messages
from orchestrator.errors import ConfigError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIXED_DATE = (
    '{%- macro strftime_now(format) -%}{{ "2024-07-26" if format == "%Y-%m-%d" else "26 Jul 2024" }}{%- endmacro +%}'
)
"""Shadows a template's clock: a run whose tokens depend on the day cannot be repeated (the date is Llama 3's own)."""


class AmbiguousTemplate(ValueError):
    """The chat template does not let the assistant's part of a text be found."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; ``learned`` are the spans of characters ``[start, end)`` that the loss counts."""

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """``tokens`` int32 ``[length]`` and ``learned`` bool ``[length]``: which of them the model must predict."""

    tokens: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the special tokens that it may name, rendered by transformers."""

    text: str
    special_tokens: Mapping[str, Any]

    @property
    def is_marked(self) -> bool:
        """Whether the template says itself, by ``{% generation %}``, what the assistant generates."""
        return GENERATION_MARK.search(self.text) is not None

    def render(self, messages: Messages, generation_prompt: bool = False) -> str:
        """The text of a conversation, with the opening of an assistant turn after it if asked.

        Raises:
            BadRow: the template refuses these messages (for example roles that do not alternate).
        """
        return self._render(messages, generation_prompt, marks=False)[0]

    def render_marked(self, messages: Messages) -> Rendered:
        """The text and its ``{% generation %}`` spans. Raises BadRow as :meth:`render` does."""
        text, spans = self._render(messages, False, marks=True)
        return Rendered(text, tuple(spans))

    def _render(self, messages: Messages, prompt: bool, marks: bool) -> tuple[str, list[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = FIXED_DATE + self.text if "strftime_now" in self.text else self.text
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self.special_tokens,
            )
        except TemplateError as error:
            raise BadRow("refused by the template", f"the chat template refuses it: {error}") from None
        return texts[0], spans[0] if marks else []


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a Hugging Face folder, without the network.

    Raises:
        ConfigError: it cannot be loaded, or cannot tell which characters a token stands for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"no tokenizer can be loaded from {folder}: {reason}", "check model.path") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer in {folder} is a slow one: it cannot tell which characters a token stands for",
            "convert it to a tokenizer.json, or set model.path to a folder that has one",
        )
    return tokenizer


def chat_template(tokenizer: Any, folder: Path) -> ChatTemplate:
    """The tokenizer's chat template. Raises ConfigError when it has none."""
    try:
        text = tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(
            f"the tokenizer in {folder} has no chat template",
            f"set model.path to an instruction-tuned model, or write the template to {folder / 'chat_template.jinja'}",
        ) from None
    return ChatTemplate(text, dict(tokenizer.special_tokens_map))


def render(template: ChatTemplate, messages: Messages, train_on: str) -> Rendered:
    """Render a conversation and find what is learned.

    ``all`` of it, the ``assistant`` turns with their closing, or the ``last`` of those: all that can be found where a
    template writes earlier turns differently (without their thoughts).

    Without ``{% generation %}`` marks, an assistant turn is what the text gains from it: the conversation before it
    with an opened assistant turn must be the beginning of the conversation up to it, and that of the whole.

    Raises:
        AmbiguousTemplate: it is not.
        BadRow: the template refuses the conversation.
    """
    if train_on == "all":
        text = template.render(messages)
        return Rendered(text, ((0, len(text)),))
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        turns = turns[-1:]
    if template.is_marked:
        marked = template.render_marked(messages)
        return marked if train_on == "assistant" else _since(marked, template.render(messages[: turns[0]]))
    text = template.render(messages)
    return Rendered(text, tuple(_assistant_span(template, messages, turn, text) for turn in turns))


def _since(rendered: Rendered, before: str) -> Rendered:
    """Only what is learned after the text ``before``."""
    if not rendered.text.startswith(before):
        raise AmbiguousTemplate("what comes before the last turn is rendered differently with it")
    return Rendered(rendered.text, tuple(span for span in rendered.learned if span[0] >= len(before)))


def _assistant_span(template: ChatTemplate, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    """Where the assistant turn ``messages[turn]`` and its closing token stand in ``text``."""
    before = template.render(messages[:turn], generation_prompt=True)
    after = template.render(messages[: turn + 1])
    if not after.startswith(before):
        raise AmbiguousTemplate(f"turn {turn + 1} does not start where the prompt for it ends")
    if not text.startswith(after):
        raise AmbiguousTemplate(f"turns up to {turn + 1} are rendered differently when more turns follow")
    span, content = after[len(before) :], messages[turn]["content"].strip()
    has_no_prompt = before == template.render(messages[:turn])
    if has_no_prompt and not span.lstrip().startswith(content):
        raise AmbiguousTemplate("it does nothing for add_generation_prompt, so the assistant's header looks learned")
    closed = span.rstrip()
    is_closed_by_spaces = closed.endswith(content)
    return len(before), len(after) if is_closed_by_spaces else len(before) + len(closed)


def encode(tokenizer: Any, conversations: Sequence[Rendered]) -> list[Encoded]:
    """Tokenise rendered conversations (special tokens in the text are special; none are added).

    A token is learned when it stands for at least one character of a learned span.
    """
    if not conversations:
        return []
    batch = tokenizer(
        [conversation.text for conversation in conversations],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        Encoded(np.asarray(tokens, np.int32), learned_mask(offsets, conversation.learned))
        for tokens, offsets, conversation in zip(
            batch["input_ids"], batch["offset_mapping"], conversations, strict=True
        )
    ]


def learned_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Mark the tokens that overlap a span.

    Byte-level tokenizers may leave spaces out of a token's offsets: characters that no token claims belong to the
    token after them.

    Args:
        offsets: characters ``[start, end)`` of every token, ascending.
        spans: characters ``[start, end)`` to mark.
    Returns:
        bool ``[tokens]``.
    Example:
        >>> learned_mask([(0, 2), (3, 5), (5, 6)], [(2, 5)]).tolist()
        [False, True, False]
    """
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    starts = np.minimum(starts, np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)])
    mask = np.zeros(len(ends), bool)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    return mask
