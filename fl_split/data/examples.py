"""One private row -> token ids, and which of them the loss counts.

Data path: rows -> **examples** -> batches (`batches`).
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fl_split.config import Data
from fl_split.data.chats import encode_chat, read_messages
from fl_split.data.unusable import EMPTY, Unusable, text_of
from fl_split.errors import DataError
from fl_split.model.loss import IGNORED

Example = dict[str, Any]  # "input_ids": one per token; "labels": one per token, or the class of the whole

NO_ROOM = "with nothing to learn within data.max-length"
NO_LABEL = "without a label"
UNKNOWN_LABEL = "with a label that data.labels does not name"

MISSING = "texts are nothing but NA, NULL, nan or the like: leave these rows out if that is how a program wrote nothing"
_NOTHING = {"na", "<na>", "n/a", "#n/a", "nan", "null", "none", "\\n"}  # of R, pandas, Excel, databases

_TRUTHS = {"true": "1", "false": "0"}  # Excel writes them in capitals


@dataclass(frozen=True)
class Made:
    """An example of a row."""

    example: Example
    num_cut: int  # tokens that did not fit into it
    content: str  # what of the row was read: equal for equal rows
    remarks: tuple[str, ...] = ()  # for the report; the example is used all the same


def template_of(config: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Choose how prompt and response become one text: ``plain``, ``chat``, a format string, or "" for no prompt."""
    if config.text or config.messages:
        return ""
    if config.template == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    return config.template


def describe_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe a template to a person who has to write prompts as they were trained on."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    if template == "chat":
        return "chat: the model's own chat template, with the prompt as the user's message"
    shown = "{prompt}\n{response}" if template == "plain" else template
    shown += "" if "{response}" in shown else "{response}"
    kind = "plain" if template == "plain" else "data.template"
    return f"{kind}: {json.dumps(f'{bos}{shown}{eos}', ensure_ascii=False)}"


def example_maker(config: Data, tokenizer: PreTrainedTokenizerBase) -> Callable[[dict[str, Any]], Made]:
    """Make what makes an example of a row's values; it raises `Unusable` for one that cannot be used.

    Raises:
        DataError: The tokenizer cannot do what the configuration asks of it.
    """
    template = template_of(config, tokenizer)
    if config.labels:
        return lambda values: _labelled(values, config, tokenizer)
    if config.messages or template == "chat":
        _check_chat_template(config, tokenizer)
    if config.messages:
        return lambda values: _chat(read_messages(values.get(config.messages)), config, tokenizer)
    if config.text:
        return lambda values: _plain_text(values, config, tokenizer)
    return lambda values: _prompt_and_response(values, config, template, tokenizer)


def _made(ids: list[int], labels: list[int], config: Data, content: Any, remarks: list[str] | None = None) -> Made:
    kept = labels[: config.max_length]
    if all(label == IGNORED for label in kept[1:]):  # the first token has nothing to be predicted from
        raise Unusable(NO_ROOM)
    example = {"input_ids": ids[: config.max_length], "labels": kept}
    return Made(example, max(0, len(ids) - config.max_length), _canonical(content), tuple(remarks or ()))


def _missing(*texts: str) -> list[str]:
    return [MISSING] if any(text.strip().lower() in _NOTHING for text in texts) else []


def _canonical(content: Any) -> str:
    """Write what was read in one way, whatever system ended its lines."""
    return json.dumps(content, sort_keys=True, default=str).replace("\\r\\n", "\\n")


def _text(values: dict[str, Any], key: str, column: str) -> str:
    value = values.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas' nothing
        raise Unusable(EMPTY)
    text = text_of(value, key)
    if not any(letter.isprintable() and letter != " " for letter in text):  # of some letters, all have no width
        raise Unusable(EMPTY)
    return text


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [bos] if bos is not None else [], [eos] if eos is not None else []


def _plain_text(values: dict[str, Any], config: Data, tokenizer: PreTrainedTokenizerBase) -> Made:
    """Tokenize a text; labels count all of it."""
    text, (bos, eos) = _text(values, "data.text", config.text), _ends(tokenizer)
    tail = tokenizer.encode(text, add_special_tokens=False) + eos
    return _made(bos + tail, [IGNORED] * len(bos) + tail, config, [text.strip()], _missing(text))


def _prompt_and_response(
    values: dict[str, Any], config: Data, template: str, tokenizer: PreTrainedTokenizerBase
) -> Made:
    """Write and tokenize prompt and response; labels count the response, and what ends it."""
    prompt = text_of(values.get(config.prompt), "data.prompt")
    response = _text(values, "data.response", config.response)
    content, remarks = [prompt.strip(), response.strip()], _missing(prompt, response)
    if template == "chat":
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids, labels, more = encode_chat(messages, tokenizer)
        return _made(ids, labels, config, content, remarks + more)
    if template == "plain":
        template = "{prompt}\n" if prompt else "{prompt}"
    before, _, after = template.partition("{response}")
    head, _, invitation = before.partition("{prompt}")
    (bos, eos), asked = _ends(tokenizer), f"{head}{prompt}{invitation}"
    front = tokenizer.encode(asked, add_special_tokens=False) if asked else []
    front = front if front[:1] == bos else bos + front
    tail = tokenizer.encode(f"{response}{after}", add_special_tokens=False)
    tail += [] if tail[-1:] == eos else eos
    return _made(front + tail, [IGNORED] * len(front) + tail, config, content, remarks)


def _labelled(values: dict[str, Any], config: Data, tokenizer: PreTrainedTokenizerBase) -> Made:
    """Tokenize a text as the model's own tokenizer frames it, with its class."""
    label = _class_of(values.get(config.label), config.label_names)
    text = _text(values, "data.text", config.text)
    ids = tokenizer.encode(text)
    num_tokens = len(ids)
    if num_tokens > config.max_length:
        ids = tokenizer.encode(text, truncation=True, max_length=config.max_length)
    content = _canonical([text.strip(), label])
    return Made({"input_ids": ids, "labels": label}, num_tokens - len(ids), content, tuple(_missing(text)))


def _class_of(value: Any, names: tuple[str, ...]) -> int:
    if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
        raise Unusable(NO_LABEL)
    for spelling in _spellings(value):
        if spelling in names:
            return names.index(spelling)
    raise Unusable(UNKNOWN_LABEL)


def _spellings(value: Any) -> Iterator[str]:
    """Spell a label as it stands; whole numbers with and without ``.0``, since nulls make them fractions; true as 1."""
    text = str(value).strip()
    yield text
    if text.lower() in _TRUTHS:
        yield from (text.lower(), _TRUTHS[text.lower()])
    with suppress(ValueError, OverflowError):
        number = float(text)
        if number.is_integer():
            yield from (str(int(number)), str(number))


def _check_chat_template(config: Data, tokenizer: PreTrainedTokenizerBase) -> None:
    key = f"data.messages={config.messages!r}" if config.messages else f"data.template={config.template!r}"
    if not tokenizer.chat_template:
        raise DataError(
            f"{key} needs the tokenizer's chat template, and this model's has none: take the model's chat version, put "
            "a chat_template.jinja into its folder, or use data.prompt and data.response with data.template='plain'"
        )
    if not tokenizer.is_fast:
        other = "" if config.messages else ", or set data.template='plain'"
        raise DataError(f"{key} needs a fast tokenizer, one with tokenizer.json: this model's has none{other}")


def _chat(messages: list[dict[str, Any]], config: Data, tokenizer: PreTrainedTokenizerBase) -> Made:
    ids, labels, remarks = encode_chat(messages, tokenizer)
    content = [{**message, "content": message["content"].strip()} for message in messages]
    return _made(ids, labels, config, content, remarks)
