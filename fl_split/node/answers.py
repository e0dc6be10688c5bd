"""Questions -> answers with a tuned model: one at a time as text comes, or files of them in batches.

Data path: questions -> **tokens, batches -> generate -> texts** -> a terminal, a file, an endpoint.
"""

import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fl_split.data.batches import pad_left
from fl_split.errors import DataError
from fl_split.node.draw import Draw
from fl_split.node.tuned import Tuned


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    lookup: int = 0  # tokens guessed at a time from what is there already; 0: none


@dataclass
class Answer:
    """An answer on its way: iterate over its text; then `num_tokens` and `reason` are known."""

    texts: Iterator[str]
    num_prompt_tokens: int
    cancel: Callable[[], None]
    num_tokens: int = 0
    reason: str = "stop"  # or "length"
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __iter__(self) -> Iterator[str]:
        return self.texts


class _Cancelled(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class _Tokens(BaseStreamer):
    """Tokens as they are chosen, without the prompt's; None at the end."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self.queue.put(value.flatten().tolist())
        self._prompt = False

    def end(self) -> None:
        self.queue.put(None)


def options_of(tuned: Tuned, sampling: Sampling, rows: Sequence[int], prompt_length: int) -> dict[str, Any]:
    """What `generate` is called with; `rows` are numbers of the questions, each of which draws tokens of its own."""
    options: dict[str, Any] = {"max_new_tokens": sampling.max_tokens, "use_cache": True, "do_sample": False}
    options |= {"temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        draw = Draw([f"{seed} {row}" for row in rows], sampling.temperature, sampling.top_p, prompt_length)
        options["logits_processor"] = LogitsProcessorList([draw])
    if sampling.stop:
        options |= {"stop_strings": list(sampling.stop), "tokenizer": tuned.tokenizer}
    if sampling.lookup:
        options["prompt_lookup_num_tokens"] = sampling.lookup
    return options


def answer(tuned: Tuned, ids: Sequence[int], sampling: Sampling) -> Answer:
    """Begin to answer one prompt; its text comes as it is made.

    Iterating raises whatever went wrong, such as `TrunkUnavailable`.

    Raises:
        DataError: The prompt is empty, or too long.
    """
    most = _room(tuned, [ids], sampling)
    streamer, cancelled = _Tokens(), _Cancelled()
    prompt = torch.tensor([list(ids)], device=tuned.model.device)
    failed: list[Exception] = []

    def generate() -> None:
        try:
            out = tuned.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([cancelled]),
                **{**options_of(tuned, sampling, [0], prompt.shape[1]), "max_new_tokens": most},
            )
            made.num_tokens = out.shape[1] - prompt.shape[1]
            made.reason = "length" if made.num_tokens >= most and not cancelled.event.is_set() else "stop"
        except Exception as error:  # it belongs to whoever iterates
            failed.append(error)
            streamer.end()

    def texts() -> Iterator[str]:
        thread = threading.Thread(target=generate, name="answer", daemon=True)
        thread.start()
        try:
            yield from until_stop(_decode(tuned, streamer), sampling.stop, cancelled.event.set)
            thread.join()
        finally:
            cancelled.event.set()
        made.seconds = time.monotonic() - made.started
        if failed:
            raise failed[0]

    made = Answer(texts(), prompt.shape[1], cancelled.event.set)
    return made


def _room(tuned: Tuned, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    """How many tokens answers to these prompts may have."""
    longest, most = max(map(len, prompts)), tuned.max_length
    if sampling.max_tokens < 1:
        raise DataError(f"max_tokens={sampling.max_tokens}: an answer has at least 1")
    if not all(prompts):
        raise DataError("the prompt is empty: ask something")
    if longest >= most:
        raise DataError(f"a prompt has {longest} tokens: model and trunk take at most {most}, its answer included")
    return min(sampling.max_tokens, most - longest)


def _decode(tuned: Tuned, tokens: _Tokens) -> Iterator[str]:
    """Text as it grows: what is there is decoded as a whole, for spaces and letters may need several tokens."""
    ids: list[int] = []
    said = ""
    for new in iter(tokens.queue.get, None):
        ids += new
        text = _text(tuned, ids).rstrip()  # some tokenizers drop a space once they know what follows
        if text.startswith(said) and not text.endswith("\ufffd"):  # else a letter is not complete
            yield text[len(said) :]
            said = text
    yield _text(tuned, ids)[len(said) :]


def _text(tuned: Tuned, ids: Sequence[int]) -> str:
    return str(tuned.tokenizer.decode(list(ids), skip_special_tokens=True))


def until_stop(texts: Iterator[str], stop: Sequence[str], stopped: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Pass text on up to a stop string, and say so; what may be the beginning of one is held back."""
    held = ""
    for text in texts:
        held += text
        found = [at for at in (held.find(s) for s in stop) if at >= 0]
        if found:
            stopped()  # transformers sees a stop string only where tokens spell it
            yield held[: min(found)]
            for _ in texts:  # to its end: the rest is nobody's
                pass
            return
        begun = (at for at in range(len(held)) if any(s.startswith(held[at:]) for s in stop))
        safe = next(begun, len(held))
        if held[:safe]:
            yield held[:safe]
        held = held[safe:]
    if held:
        yield held


# ---------------------------------------------------------------------------------------------------------- files


def answer_file(
    tuned: Tuned,
    questions: Path,
    answers: Path,
    column: str,
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Answer each row of a JSONL file; rows go to `answers` with an ``answer`` of their own, in the same order.

    What is in `answers` already is not asked again: a run that was cut off goes on where it was.

    Args:
        tuned: Whom to ask.
        questions: A JSON object a line.
        answers: To be written, and flushed after each batch.
        column: Of the question: a text, or a list of messages.
        sampling: How.
        batch_size: Questions at the same time.
        progress: Told how many are done, and of how many.

    Returns:
        How many were answered now.

    Raises:
        DataError: A row that holds no question or too long a one, or answers to other questions.
    """
    if questions.resolve() == answers.resolve():
        raise DataError(f"--in and --out are both {answers}: name another file for the answers")
    rows = _read_rows(questions)
    prompts = [_prompt(tuned, row, column, i) for i, row in enumerate(rows)]
    done = _answered(rows, answers)
    progress(done, len(rows))
    first = done
    with _appended(answers) as file:
        while done < len(rows):
            batch = slice(done, done + batch_size)
            texts = answer_batch(tuned, prompts[batch], sampling, done)
            for row, text in zip(rows[batch], texts, strict=True):
                file.write(json.dumps({**row, "answer": text}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            done += len(texts)
            progress(done, len(rows))
    return done - first


def _appended(answers: Path) -> TextIO:
    try:
        return answers.open("a", encoding="utf-8", errors="backslashreplace")  # half a letter, as JSON writes it
    except OSError as error:
        raise DataError(f"--out {answers} cannot be written ({type(error).__name__})") from None


def answer_batch(tuned: Tuned, prompts: Sequence[Sequence[int]], sampling: Sampling, first: int = 0) -> list[str]:
    """Answer prompts at the same time, padded on the left.

    Args:
        tuned: Whom to ask.
        prompts: Their tokens.
        sampling: How.
        first: The first one's number in its file, so that what is drawn does not depend on who shares the batch.

    Raises:
        DataError: A prompt is empty, or too long.
    """
    most = _room(tuned, prompts, sampling)
    inputs = pad_left(prompts, int(tuned.tokenizer.pad_token_id or 0), tuned.model.device)
    rows, longest = range(first, first + len(prompts)), inputs["input_ids"].shape[1]
    options = {**options_of(tuned, sampling, rows, longest), "max_new_tokens": most}
    out = tuned.model.generate(**inputs, **options)
    return ["".join(until_stop(iter([_text(tuned, row)]), sampling.stop)) for row in out[:, longest:].tolist()]


def _read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--in {file} cannot be read ({type(error).__name__}): expected a JSON object a line") from None
    rows = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"--in {file}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def _prompt(tuned: Tuned, row: Mapping[str, Any], column: str, index: int) -> list[int]:
    question = row.get(column)
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"line {index + 1} has no text and no messages in {column!r}: set --prompt to the key that has")
    ids = tuned.encode(messages)
    try:
        _room(tuned, [ids], Sampling())
    except DataError as error:
        raise DataError(f"line {index + 1}: {error}") from None
    return ids


def _answered(rows: Sequence[Mapping[str, Any]], answers: Path) -> int:
    """How many answers are there; a line that a cut-off run left unfinished is removed."""
    if not answers.exists():
        return 0
    data = answers.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with answers.open("r+b") as file:
            file.truncate(len(whole))
    try:
        found = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise DataError(f"--out {answers} is no file of answers: name another file, or remove it") from None
    if not all(isinstance(row, dict) and "answer" in row for row in found):
        raise DataError(f"--out {answers} holds lines without an answer: name a file of its own, or remove it")
    asked = [{key: value for key, value in row.items() if key != "answer"} for row in found]
    given = [{key: value for key, value in row.items() if key != "answer"} for row in rows[: len(found)]]
    if len(found) > len(rows) or asked != given:
        raise DataError(f"--out {answers} holds answers to other questions: name another file, or remove it")
    return len(found)
