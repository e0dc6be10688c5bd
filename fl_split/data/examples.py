"""One private row -> token ids, and which of them the loss counts.

Data path: rows -> **examples** -> batches (`data.py`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fl_split.config import Data
from fl_split.errors import DataError
from fl_split.model.loss import IGNORED

Example = dict[str, Any]  # "input_ids": one per token; "labels": one per token, or the class of the whole

MALFORMED = "malformed"
NO_TEXT = "without text in a column"
EMPTY = "empty"
NO_ROOM = "with nothing to learn within data.max-length"
UNKNOWN_LABEL = "with a label that data.labels does not name"
NOT_A_CHAT = "without a list of messages with role and content"
NO_ANSWER = "without an assistant message"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks assistant text in a template


class Unusable(Exception):
    """A row of which no example can be made; `reason` is one of the constants above, without any of its content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Made:
    """An example, and how many tokens did not fit into it."""

    example: Example
    num_cut: int


def example_maker(config: Data, tokenizer: PreTrainedTokenizerBase) -> Callable[[dict[str, Any]], Made]:
    """What makes an example of a row's values; it raises `Unusable` for one that cannot be used.

    Raises:
        DataError: The tokenizer cannot do what the configuration asks of it.
    """
    if config.labels:
        return lambda values: _labelled(values, config, tokenizer)
    if config.messages:
        _check_template(config, tokenizer)
        return lambda values: _cut(*_chat(values.get(config.messages), tokenizer), config)
    return lambda values: _cut(*_prompt_and_response(values, config, tokenizer), config)


def _cut(ids: list[int], labels: list[int], config: Data) -> Made:
    kept = labels[: config.max_length]
    if all(label == IGNORED for label in kept[1:]):  # the first token has nothing to be predicted from
        raise Unusable(NO_ROOM)
    example = {"input_ids": ids[: config.max_length], "labels": kept}
    return Made(example, max(0, len(ids) - config.max_length))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Unusable(NO_TEXT)
    if not value.strip():
        raise Unusable(EMPTY)
    return value


def _prompt_and_response(
    values: dict[str, Any], config: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenize prompt and response; labels count the response only, or all of a plain text."""
    prompt = "" if config.text else values.get(config.prompt)
    if not isinstance(prompt, str):
        raise Unusable(NO_TEXT)
    response = _text(values.get(config.text or config.response))
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    head = bos + (tokenizer.encode(f"{prompt}\n", add_special_tokens=False) if prompt else [])
    tail = tokenizer.encode(response, add_special_tokens=False) + eos
    return head + tail, [IGNORED] * len(head) + tail


def _labelled(values: dict[str, Any], config: Data, tokenizer: PreTrainedTokenizerBase) -> Made:
    """Tokenize a text as the model's own tokenizer frames it, with its class."""
    label = str(values.get(config.label))
    if label not in config.label_names:
        raise Unusable(UNKNOWN_LABEL)
    text = _text(values.get(config.text))
    ids = tokenizer.encode(text)
    num_tokens = len(ids)
    if num_tokens > config.max_length:
        ids = tokenizer.encode(text, truncation=True, max_length=config.max_length)
    return Made({"input_ids": ids, "labels": config.label_names.index(label)}, num_tokens - len(ids))


# -------------------------------------------------------------------------------------------------------- chats


def _check_template(config: Data, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"data.messages={config.messages!r} needs the tokenizer's chat template, and this model's has none: take "
            "the model's chat version, put a chat_template.jinja into its folder, or use data.prompt and data.response"
        )
    if not tokenizer.is_fast:
        raise DataError("data.messages needs a fast tokenizer, one with tokenizer.json: this model's has none")


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokenize a conversation by the template; labels count what the assistant says, and how it ends its turns."""
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise Unusable(NOT_A_CHAT)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
    if not turns:
        raise Unusable(NO_ANSWER)
    if _GENERATION.search(str(tokenizer.chat_template)):
        coded: Any = _template(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, counted = coded["input_ids"], [bool(value) for value in coded["assistant_masks"]]
    else:
        text = _template(tokenizer, messages, tokenize=False)
        spans = [_span(tokenizer, messages, i, text) for i in turns]
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = coded["input_ids"]
        counted = [any(a <= start < b for a, b in spans) for start, _ in coded["offset_mapping"]]
    return list(ids), [token if yes else IGNORED for token, yes in zip(ids, counted, strict=True)]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:  # such as a template that wants roles to alternate; its text may quote the chat
        raise Unusable(f"refused by the chat template ({type(error).__name__})") from None


def _span(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], turn: int, text: str) -> tuple[int, int]:
    """Find where in `text`, the whole conversation, the assistant's `turn` begins and ends.

    It begins where the template invites the assistant to speak, and ends where the conversation would if it ended
    there. Some templates write the last turn otherwise than earlier ones (with room for thoughts, say): then an
    earlier turn is its content and what the template puts after it.

    Raises:
        DataError: This template leaves no way to tell.
    """
    before = _template(tokenizer, messages[:turn], tokenize=False, add_generation_prompt=True)
    until = _template(tokenizer, messages[: turn + 1], tokenize=False)
    if text.startswith(before) and text.startswith(until):
        return len(before), len(until)
    content = messages[turn]["content"].strip()
    ending = content + until.rpartition(content)[2]
    begin = len(before) if text.startswith(before) else -1
    found = text.find(ending, begin) if begin >= 0 and content in until else -1
    if found < 0:
        raise DataError(
            "this tokenizer's chat template rewrites earlier turns, so that the assistant's words cannot be told from "
            "the rest: mark them in the template with {% generation %}, or keep one answer per conversation"
        )
    return found, found + len(ending)
