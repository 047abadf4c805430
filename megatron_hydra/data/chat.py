"""Conversations to tokens, with the assistant's turns marked as what is learned.

The conversation is rendered once by the tokenizer's chat template. A turn of the assistant begins
where the template, given all earlier messages and asked for a reply, ends; it ends after its text
and the special token that closes the turn. Templates that rewrite earlier turns (Qwen3 drops old
reasoning) are therefore handled; one where a turn cannot be found makes the row a bad one.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np


class ChatError(ValueError):
    """A conversation that cannot be rendered; the message says why."""


def render_chat(tokenizer: Any, messages: list[Any]) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation and the character spans of the assistant's turns.

    Args:
        tokenizer: with a chat template.
        messages: ``{"role": …, "content": …}`` each; the roles are the template's.

    Raises:
        ChatError: malformed messages, no turn of the assistant, or an unsuitable template.
    """
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ChatError("a message has no role")
        if not isinstance(message.get("content"), str):
            raise ChatError(f"a message of role {message['role']!r} has no text content")
    text = _apply(tokenizer, messages, reply=False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            spans.append(_span(tokenizer, text, messages, number))
    if not spans:
        raise ChatError("no message of the assistant: nothing to learn")
    return text, spans


def _apply(tokenizer: Any, messages: list[Any], reply: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    except Exception as error:  # templates raise what they like
        raise ChatError(f"the chat template refused it: {error}") from error


def _span(tokenizer: Any, text: str, messages: list[Any], number: int) -> tuple[int, int]:
    """Characters of message ``number``, its closing special token included.

    The turn goes up to the first special token behind the prompt, if the text of the message lies
    before that. Only the *last* place where the text occurs counts: a short answer such as "k" also
    occurs in the "<think>" that a template puts before it.
    """
    before = _apply(tokenizer, messages[:number], reply=True) if number else ""
    if not text.startswith(before):
        raise ChatError(f"the chat template renders what precedes message {number} differently")
    begin = len(before)
    content = messages[number]["content"].strip()
    candidates = content, content.rsplit("</think>", 1)[-1].strip()
    tokens = "|".join(re.escape(token) for token in tokenizer.all_special_tokens)
    closing = re.compile(tokens).search(text, begin) if tokens else None
    if closing and any(text.rfind(c, begin, closing.start()) >= 0 for c in candidates):
        return begin, closing.end()
    for candidate in candidates:  # no special token closes a turn, or the text itself holds one
        at = text.find(candidate, begin)
        if at >= 0:
            end = at + len(candidate)
            match = re.compile(rf"\s*(?:{tokens})").match(text, end) if tokens else None
            return begin, match.end() if match else end
    raise ChatError(f"the chat template changes the text of message {number}")


def encode_chat(tokenizer: Any, messages: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a conversation and which of them are learned.

    Args:
        tokenizer: a fast HF tokenizer with a chat template (offsets are needed).
        messages: see :func:`render_chat`.

    Returns:
        ids int64 ``[n]`` and learned bool ``[n]``.

    Raises:
        ChatError: see :func:`render_chat`.
    """
    text, spans = render_chat(tokenizer, messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoding["offset_mapping"]], dtype=np.int64)
    learned = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        learned |= (starts >= begin) & (starts < end)
    return np.array(encoding["input_ids"], dtype=np.int64), learned


def runs(learned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and values (int8) of the runs of equal values in ``learned``."""
    edges = np.flatnonzero(np.diff(learned)) + 1
    bounds = np.concatenate([[0], edges, [len(learned)]])
    return np.diff(bounds).astype(np.int32), learned[bounds[:-1]].astype(np.int8)
