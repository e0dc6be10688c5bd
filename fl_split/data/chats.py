"""Conversations: common shapes of them -> one shape -> tokens, and which of them the assistant says.

Data path: a row's messages -> **token ids and labels** -> examples. One conversation's fault is one row's fault.
"""

import ast
import json
import os
import re
from contextlib import suppress
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fl_split.data.unusable import Unusable, text_of
from fl_split.model.loss import IGNORED

NOT_A_CHAT = "without a list of messages with role and content"
NOT_TEXT = "with a message part that is no text"
NO_ANSWER = "without an assistant message that answers"
REWRITTEN = (
    "whose chat template rewrites earlier turns, so that the assistant's words cannot be told from the rest: mark them "
    "in the template with {% generation %}, or keep one answer per conversation"
)
UNINVITED = (
    "chats end otherwise than the chat template invites the assistant to speak (it opens a thought, say): what is "
    "learnt is the answer as the template writes it, without what the invitation adds"
)
LEFT_OUT = "chats have messages that the chat template leaves out or rewrites"
WEIGHED = "chats have messages of weight 0, which are learnt all the same, since the chat template marks what is"
UNENDED = (
    "chats whose template writes, or marks as the assistant's, nothing after the last answer: the model is not taught "
    "to end one; add an end token to the template"
)

Message = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "ai": "assistant"}
_ROLES |= {"chatbot": "assistant", "model": "assistant", "observation": "tool"}  # others stay as they are
_KEYS = {"from": "role", "speaker": "role", "author": "role", "sender": "role", "type": "role"}
_KEYS |= {"value": "content", "text": "content", "parts": "content", "message": "content"}
_TEXTS = ("text", "input_text", "output_text")  # types of parts that are text
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks assistant text in a template


def read_messages(value: object) -> list[Message]:
    """Bring what is found into one shape: role and content, ShareGPT's from and value, parts, all that as a string.

    An object with a list of messages in it is that list; one of equally long lists, such as `datasets` and Parquet
    make of a list of objects, is a message for each of their items.

    Raises:
        Unusable: It is no conversation.
    """
    if isinstance(value, str):  # in a column of CSV, for one
        value = _read(value)
    if isinstance(value, dict):
        value = _listed(value)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable(NOT_A_CHAT)
    messages = [_message(message) for message in value]
    if not _turns(messages):
        raise Unusable(NO_ANSWER)
    return messages


def _read(text: str) -> Any:
    """Read a list or object that was written as JSON or, by pandas, as Python shows it."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return None


def _listed(value: dict[str, Any]) -> Any:
    lists = [inner for inner in value.values() if isinstance(inner, list)]
    if len(lists) == 1:
        return lists[0]
    if len(lists) < len(value) or len(set(map(len, lists))) != 1:
        raise Unusable(NOT_A_CHAT)
    return [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]


def _message(found: Message) -> Message:
    message = {key: value for key, value in found.items() if value is not None}  # Parquet fills up
    for other, key in _KEYS.items():
        if other in message and key not in message:
            message[key] = message.pop(other)
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if content is None and ("content" in found or message.get("tool_calls")):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable(NOT_A_CHAT)
    role = role.strip().lower()
    return {**message, "role": _ROLES.get(role, role), "content": text_of(content)}


def _part(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in _TEXTS else part
    if not isinstance(text, str):
        raise Unusable(NOT_TEXT)
    return text


def _turns(messages: list[Message]) -> list[int]:
    """Find the messages that are learnt; what opens a conversation answers nobody, and is not."""
    said = [message["role"] == "assistant" and message.get("weight") != 0 for message in messages]
    return [
        i
        for i, message in enumerate(messages)
        if i > 0 and said[i] and (message["content"].strip() or message.get("tool_calls"))
    ]


def encode_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[str]]:
    """Tokenize a conversation by the template; labels count what the assistant says, and how it ends its turns.

    Returns:
        Token ids, labels, and remarks for the report.

    Raises:
        Unusable: The template does not take it, or leaves no way to tell what the assistant says.
    """
    if _GENERATION.search(str(tokenizer.chat_template)):
        coded: Any = _template(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, counted = coded["input_ids"], [bool(value) for value in coded["assistant_masks"]]
        remarks = [WEIGHED] if any(message.get("weight") == 0 for message in messages) else []
    else:
        text = _template(tokenizer, messages, tokenize=False)
        found = [_span(tokenizer, messages, i, text) for i in _turns(messages)]
        spans = [span for span, _ in found]
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = coded["input_ids"]
        counted = [any(_overlap(token, span) for span in spans) for token in coded["offset_mapping"]]
        remarks = [UNINVITED] if any(uninvited for _, uninvited in found) else []
        others = [message["content"].strip() for message in messages if message["role"] != "assistant"]
        remarks += [LEFT_OUT] if any(other not in text for other in others) else []
    remarks += [] if _is_ended(messages, ids, counted, tokenizer) else [UNENDED]
    return list(ids), [token if yes else IGNORED for token, yes in zip(ids, counted, strict=True)], remarks


def _is_ended(messages: list[Message], ids: list[int], counted: list[bool], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether anything that is learnt follows the last answer's own text; spaces and new lines end nothing."""
    last = "".join(messages[_turns(messages)[-1]]["content"].split())
    said = str(tokenizer.decode([token for token, yes in zip(ids, counted, strict=True) if yes]))
    return not last or not "".join(said.split()).endswith(last)


def _overlap(token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Tell whether any of a token belongs to the span; its first one may begin with what precedes, such as a space."""
    return token[0] < span[1] and token[1] > span[0] or token[0] == token[1] and span[0] <= token[0] < span[1]


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:  # such as a template that wants roles to alternate; its text may quote the chat
        raise Unusable(f"refused by the chat template ({type(error).__name__})") from None


def _span(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], turn: int, text: str
) -> tuple[tuple[int, int], bool]:
    """Find where in `text` the assistant's `turn` begins and ends, and whether it was invited otherwise.

    It begins where the template invites the assistant to speak, and ends where the conversation would if it ended
    there. An invitation may say more than a finished turn has, such as the beginning of a thought: then the turn begins
    where the two part. Some templates write the last turn otherwise than earlier ones (with room for thoughts, say):
    then an earlier turn is its content and what the template puts after it.

    Raises:
        Unusable: This template leaves no way to tell.
    """
    invited = _template(tokenizer, messages[:turn], tokenize=False, add_generation_prompt=True)
    until = _template(tokenizer, messages[: turn + 1], tokenize=False)
    content = messages[turn]["content"].strip()
    uninvited = not text.startswith(invited)
    begin = len(os.path.commonprefix([invited, text]))
    if uninvited:
        before = _template(tokenizer, messages[:turn], tokenize=False)
        at = text.find(content, len(before))
        if not text.startswith(before) or begin < len(before) or not content or at < 0:
            raise Unusable(REWRITTEN)
        begin = min(begin, at)
    if text.startswith(until):
        return (begin, len(until)), uninvited
    ending = content + until.rpartition(content)[2]
    found = text.find(ending, begin) if content and content in until else -1
    if found < 0:
        raise Unusable(REWRITTEN)
    return (found, found + len(ending)), uninvited
