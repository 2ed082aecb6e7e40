"""What is learned of a conversation: the assistant's turns, found by marks or by prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.conversations import BadRow
from orchestrator.errors import ConfigError
from orchestrator.objectives import sft
from tests.orchestrator.tiny_tokenizer import CHATML, MARKED, load, write_tokenizer

PROMPTLESS = CHATML.split("{% if add_generation_prompt")[0]
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
REWRITES_EARLIER = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think></think>' }}{% endif %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
OTHER_HEADER = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}")
ALTERNATES = "{{ raise_exception('roles must alternate') }}"
# As Qwen3's: only after the last question does an answer show its (here: empty) thoughts.
QWEN3 = (
    "{% set last = namespace(user=0) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > last.user %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSED_BY_SPACES = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def chat(*turns: str) -> list[dict[str, str]]:
    """Turns of a user and an assistant, in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


def template_of(text: str) -> sft.ChatTemplate:
    return sft.ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"})


def learned_text(text: str, messages: list[dict[str, str]], train_on: str = "assistant") -> list[str]:
    rendered = sft.render(template_of(text), messages, train_on)
    return [rendered.text[start:end] for start, end in rendered.learned]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Any, Path]]:
    """Tokenizers whose offsets hold the spaces, and whose offsets leave them out (key: trimmed)."""
    folders = {trim: write_tokenizer(tmp_path_factory.mktemp("tokenizer"), MARKED, trim) for trim in (False, True)}
    return {trim: (load(folder), folder) for trim, folder in folders.items()}


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (CHATML, ["A<|im_end|>", "B<|im_end|>"]),
        (MARKED, ["A<|im_end|>", "B<|im_end|>"]),
        (MISTRAL, [" A</s>", " B</s>"]),
        (CLOSED_BY_SPACES, ["A\n\n", "B\n\n"]),
    ],
)
def test_every_assistant_turn_is_learned_with_its_closing(template: str, learned: list[str]) -> None:
    assert learned_text(template, chat("one", "A", "two", "B")) == learned


def test_all_of_the_text_is_learned_on_demand() -> None:
    text = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert learned_text(CHATML, chat("one", "A"), "all") == [text]
    assert learned_text(REWRITES_EARLIER, chat("one", "A", "two", "B"), "all")


@pytest.mark.parametrize("template", [CHATML, MARKED, QWEN3])
def test_the_last_turn_alone_is_learned_on_demand(template: str) -> None:
    closing = "B<|im_end|>" if template != QWEN3 else "<think>\n\n</think>\n\nB<|im_end|>"
    assert learned_text(template, chat("one", "A", "two", "B"), "last") == [closing]
    assert learned_text(template, chat("one", "B"), "last") == [closing]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (QWEN3, "differently when more turns follow"),
        (REWRITES_EARLIER, "differently when more turns follow|does not start where the prompt"),
        (OTHER_HEADER, "turn 2 does not start where the prompt for it ends"),
        (PROMPTLESS, "does nothing for add_generation_prompt"),
    ],
)
def test_a_template_whose_prefixes_do_not_nest_is_ambiguous(template: str, reason: str) -> None:
    with pytest.raises(sft.AmbiguousTemplate, match=reason):
        learned_text(template, chat("one", "A", "two", "B"))


def test_later_turns_that_change_earlier_ones_are_named() -> None:
    shows_count = CHATML.replace("message['content']", "message['content'] + (messages | length > 2) | string")
    with pytest.raises(sft.AmbiguousTemplate, match="turns up to 2 are rendered differently when more turns follow"):
        learned_text(shows_count, chat("one", "A", "two"))


def test_a_row_that_the_template_refuses_is_bad() -> None:
    with pytest.raises(BadRow, match="the chat template refuses it: roles must alternate"):
        learned_text(ALTERNATES, chat("one", "A"))


def test_the_date_of_today_does_not_reach_the_tokens() -> None:
    dated = "\n{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}" + CHATML
    assert template_of(dated).render(chat("one")).startswith("\n26 Jul 2024 2024-07-26<|im_start|>user")


def test_marks_and_prefixes_give_the_hand_made_mask(tokenizers: dict[bool, tuple[Any, Path]]) -> None:
    tokenizer, _ = tokenizers[False]
    for template in (CHATML, MARKED):
        (row,) = sft.encode(tokenizer, [sft.render(template_of(template), chat("hello", "hello in"), "assistant")])
        words = [tokenizer.decode([token]) for token in row.tokens]
        assert "".join(words) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello in<|im_end|>\n"
        assert words[-5:] == ["hello", " ", "in", "<|im_end|>", "\n"]
        assert row.learned.tolist() == [False] * (len(words) - 5) + [True] * 4 + [False]


texts = st.text(st.sampled_from("helo in\n\té🙂漢 <|"), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=60)
@given(turns=st.lists(texts, min_size=2, max_size=6), trim=st.booleans())
def test_marks_prefixes_and_transformers_agree(
    tokenizers: dict[bool, tuple[Any, Path]], turns: list[str], trim: bool
) -> None:
    tokenizer, _ = tokenizers[trim]
    messages = chat(*turns)
    special = dict(tokenizer.special_tokens_map)
    rendered = [sft.render(sft.ChatTemplate(text, special), messages, "assistant") for text in (CHATML, MARKED)]
    by_prefixes, by_marks = sft.encode(tokenizer, rendered)
    assert by_prefixes.tokens.tolist() == by_marks.tokens.tolist()
    assert by_prefixes.learned.tolist() == by_marks.learned.tolist()
    theirs = tokenizer.apply_chat_template(messages, chat_template=MARKED, return_assistant_tokens_mask=not trim)
    assert by_marks.tokens.tolist() == theirs["input_ids"]
    if not trim:  # transformers stops at a span whose first character is in no token's offsets
        assert by_marks.learned.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


@pytest.mark.parametrize("trim", [False, True])
def test_spaces_around_a_span_stay_on_their_side(tokenizers: dict[bool, tuple[Any, Path]], trim: bool) -> None:
    tokenizer, _ = tokenizers[trim]
    text = "x[I] " + " A! " + " y"
    (row,) = sft.encode(tokenizer, [sft.Rendered(text, ((5, 9),))])
    assert tokenizer.decode(row.tokens[row.learned]) == " A! "
    assert tokenizer.decode(row.tokens) == text


def test_no_conversations_are_no_rows(tokenizers: dict[bool, tuple[Any, Path]]) -> None:
    assert sft.encode(tokenizers[False][0], []) == []


def test_a_token_that_stands_for_no_text_is_not_learned() -> None:
    assert not sft.learned_mask([(0, 0), (0, 3)], [(3, 6)]).any()
    assert sft.learned_mask([], [(0, 1)]).dtype == np.bool_


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "base", template=None)
    with pytest.raises(ConfigError, match="has no chat template") as caught:
        sft.chat_template(load(folder), folder)
    assert "chat_template.jinja" in caught.value.hint


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer can be loaded from") as caught:
        sft.load_tokenizer(tmp_path)
    assert caught.value.hint == "check model.path"


def test_a_slow_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    class Slow:
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: Slow())
    with pytest.raises(ConfigError, match="is a slow one: it cannot tell which characters"):
        sft.load_tokenizer(tmp_path)
