"""Tokenise conversations, with loss only on the assistant's turns.

The conversation is rendered once by the tokenizer's chat template. A turn of the assistant begins
where the template, given all earlier messages and asked for a reply, ends; it ends where the template,
given the messages up to this one, ends. Templates that render a message in another way once others
follow are handled: Qwen3 drops the reasoning of earlier turns, Mistral moves the system prompt to the
last user message, others write the end token behind the last turn only. Where the bounds of a turn
cannot be told, the row is a bad one.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

_MARK = "QvMarkOfHydraHeadvQ"
"""Text that no template changes and no conversation holds; put into a message to find it again."""
_END_OF_REASONING = "</think>"


class ChatError(ValueError):
    """A conversation that cannot be rendered; the message says why."""


def render_chat(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation and the character spans of the assistant's turns.

    Args:
        tokenizer: with a chat template.
        messages: ``{"role": …, "content": …}`` each; the roles are the template's. The content is a
            string, a list of text parts, or, beside ``tool_calls``, nothing.
        tools: descriptions of the tools that the template shows to the model.

    Raises:
        ChatError: malformed messages, no turn of the assistant, or an unsuitable template.
    """
    messages = [_checked(message) for message in messages]
    if all(message["role"] != "assistant" for message in messages):
        raise ChatError("no message of the assistant, so no token has a loss")
    error: ChatError | None = None
    for variant in _variants(tokenizer, messages, tools):
        try:
            return _Conversation(tokenizer, variant, tools).spans()
        except ChatError as failed:
            error = error or failed
    assert error is not None
    raise error


def render_prompt(tokenizer: Any, messages: list[Any], tools: list[Any] | None = None) -> str:
    """Prompt for the answer to a conversation.

    Args:
        tokenizer, messages, tools: see :func:`render_chat`.

    Raises:
        ChatError: malformed messages, or a template that refuses them or leaves out the last one.
    """
    messages = [_checked(message) for message in messages]
    error: ChatError | None = None
    for variant in _variants(tokenizer, messages, tools):
        try:
            text = _apply(tokenizer, variant, tools, reply=True)
        except ChatError as failed:
            error = error or failed
            continue
        if (_text(variant[-1]["content"]) or "").strip() in text:
            return text
    raise error or ChatError("the chat template leaves out the last message")


def _checked(message: Any) -> dict[str, Any]:
    """A message without the empty fields that tables put where another row has one."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ChatError("a message has no role")
    content, name = message.get("content"), f"a message of role {message['role']!r}"
    if content is None and not message.get("tool_calls"):
        raise ChatError(f"{name} has no text content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ChatError(f"{name} has a part of type {kind!r}: only text can be learned")
    elif content is not None and not isinstance(content, str):
        raise ChatError(f"{name} has no text content")
    _check_calls(message.get("tool_calls") or [], name)
    given = {key: value for key, value in message.items() if value is not None}
    return given | {"content": content}


def _check_calls(calls: Any, of_message: str) -> None:
    if not isinstance(calls, list):
        raise ChatError(f"tool_calls of {of_message} is not a list")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(_function(call).get("name"), str):
            raise ChatError(f"a tool call of {of_message} has no name")


def _function(call: dict[str, Any]) -> dict[str, Any]:
    """Name and arguments of a tool call, which may stand in a mapping of their own."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _variants(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None
) -> list[list[dict[str, Any]]]:
    """The forms of one conversation to try, in order, because templates expect different ones.

    Text parts are joined for a template that knows strings only, or stay parts for one that knows
    parts only. A missing content stays so for a template that asks for it, and is an empty string for
    one that would print "None".
    """
    joined = [message | {"content": _text(message["content"])} for message in messages]
    variants = [joined]
    if any(message["content"] is None for message in messages):
        filled = [message | {"content": message["content"] or ""} for message in joined]
        try:
            prints_none = _apply(tokenizer, joined, tools).count("None") > _apply(
                tokenizer, filled, tools
            ).count("None")
        except ChatError:  # it refuses the one, or the other
            prints_none = False
        variants = [filled] if prints_none else [joined, filled]
    if any(isinstance(message["content"], list) for message in messages):
        variants.append(messages)
    return variants


def _text(content: Any) -> str | None:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content


def _apply(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, reply: bool = False
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        if all(message["content"] is not None for message in messages):
            return tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=reply
            )
        # apply_chat_template would take the key away, and some templates ask whether it is none.
        (text,), _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            add_generation_prompt=reply,
            **tokenizer.special_tokens_map,
        )
        return text
    except Exception as error:  # templates raise what they like
        raise ChatError(f"the chat template failed: {error}") from error


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> str:
    """A pattern of one special token; those that are only declared as added tokens count too."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return "(?:" + "|".join(re.escape(token) for token in longest_first) + ")" if tokens else "(?!)"


class _Conversation:
    """One conversation in the form in which its template can render it."""

    def __init__(
        self, tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> None:
        self.tokenizer, self.messages, self.tools = tokenizer, messages, tools
        self.special = _special_tokens(tokenizer)
        self.text = self._render(messages)

    def _render(self, messages: list[dict[str, Any]], reply: bool = False) -> str:
        return _apply(self.tokenizer, messages, self.tools, reply)

    def spans(self) -> tuple[str, list[tuple[int, int]]]:
        """The text and the bounds of the assistant's turns in it."""
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            begin, end = self._span(number)
            if spans and begin < spans[-1][1]:
                raise ChatError(f"the chat template writes message {number} before an earlier one")
            spans.append((begin, end))
        return self.text, spans

    def _span(self, number: int) -> tuple[int, int]:
        until_here = self._render(self.messages[: number + 1])
        prompt = self._prompt(number)
        begin = self._begin(number, prompt)
        found = None
        if begin is not None and prompt is not None and until_here.startswith(prompt[:begin]):
            found = self._by_prefix(number, begin, until_here)
        found = found or self._by_mark(number)
        if found is None:
            raise ChatError(
                f"where message {number} begins and ends cannot be told: the chat template changes its text, "
                "does not close it, or renders it differently when other messages follow"
            )
        begin, end = found
        end = self._without_blanks(begin, end)
        self._check(number, self.text[begin:end])
        return begin, end

    # -- where a turn begins ------------------------------------------------------------------

    def _prompt(self, number: int) -> str | None:
        """What a model is given to answer with message ``number``; ``None``: it cannot be rendered."""
        try:
            return self._render(self.messages[:number], reply=True)
        except ChatError:  # many templates look at the first message
            return None

    def _begin(self, number: int, prompt: str | None) -> int | None:
        """Where the prompt ends in the text.

        A prompt may end in more than what is left of it in earlier turns ("<think>"): then where its last
        special token, or line, ends that is.
        """
        if prompt is None:
            return None
        if self.text.startswith(prompt):
            return len(prompt)
        try:
            before = self._render(self.messages[:number])
        except ChatError:
            return None
        if not (prompt.startswith(before) and self.text.startswith(before)):
            return None
        same = len(_common_prefix(self.text, prompt))
        ends = [m.end() for m in re.finditer(rf"{self.special}|\n", prompt[:same])]
        return ends[-1] if ends and ends[-1] > len(before) else None

    # -- by the rendered beginning of the conversation -----------------------------------------

    def _by_prefix(self, number: int, begin: int, until_here: str) -> tuple[int, int] | None:
        """The turn as the end of ``until_here``, whose front part (reasoning) may be dropped."""
        rest = self.text[begin:]
        answer = self._answer(number)
        for turn in self._without_end_tokens(until_here[begin:]):
            for start in range(len(turn)):
                part = turn[start:]
                if rest.startswith(part):
                    is_closed = not answer or not part.endswith(answer)
                    if answer in part and is_closed:
                        return begin, begin + len(part)
                    break  # shorter ends of it do not hold the answer either
        return None

    def _without_end_tokens(self, turn: str) -> list[str]:
        """The turn, and the turn without special tokens at its end, which may close the conversation."""
        turns = [turn]
        while match := re.search(rf"{self.special}\s*$", turns[-1]):
            turns.append(turns[-1][: match.start()])
        return turns

    # -- by a mark in the message ---------------------------------------------------------------

    def _by_mark(self, number: int) -> tuple[int, int] | None:
        """The turn where marks before and behind its text come out; needs a text that is a string."""
        content = self.messages[number]["content"]
        if not isinstance(content, str):
            return None
        kept = content.rstrip()
        for end_of_content in dict.fromkeys((len(content), len(kept))):
            end = self._place(number, end_of_content, len(self.messages))
            here = self._place(number, end_of_content, number + 1)
            if end is None or here is None:
                continue
            behind, at_end = self.text[end[0] :], here[1]
            for closing in self._without_end_tokens(at_end):
                if closing and behind.startswith(closing):
                    begin = self._begin_of_answer(number)
                    return None if begin is None else (begin, end[0] + len(closing))
        return None

    def _place(self, number: int, offset: int, count: int) -> tuple[int, str] | None:
        """Where ``offset`` of a message's text is among ``count`` rendered messages, and what follows."""
        message = self.messages[number]
        content = message["content"]
        marked = message | {"content": content[:offset] + _MARK + content[offset:]}
        try:
            plain = self._render(self.messages[:count])
            text = self._render(
                [*self.messages[:number], marked, *self.messages[number + 1 : count]]
            )
        except ChatError:
            return None
        before, mark, after = text.partition(_MARK)
        return (len(before), after) if mark and before + after == plain else None

    def _begin_of_answer(self, number: int) -> int | None:
        """Where the answer begins, with what the template puts between the prompt and it."""
        content = self.messages[number]["content"]
        visible = len(content) - len(content.rsplit(_END_OF_REASONING, 1)[-1].lstrip())
        place = self._place(number, visible, len(self.messages))
        if place is None:
            return None
        before = self.text[: place[0]]
        header = self._generation_prompt()
        if header and header in before:
            begin = before.rindex(header) + len(header)
            if not re.search(self.special, before[begin:]):
                return begin
        return len(before.rstrip()) if header == "" else place[0]

    def _generation_prompt(self) -> str | None:
        """What the template appends when it asks for a reply; ``None``: that cannot be told."""
        question = [{"role": "user", "content": "x"}]
        try:
            plain, asked = self._render(question), self._render(question, reply=True)
        except ChatError:
            return None
        fitting = (len(p) for p in self._without_end_tokens(plain) if asked.startswith(p))
        size = next(fitting, None)
        return None if size is None else asked[size:]

    # -- what has to hold --------------------------------------------------------------------------

    def _without_blanks(self, begin: int, end: int) -> int:
        """The end without the line break behind a closing special token: nobody generates that far."""
        match = re.search(rf"({self.special})\s*$", self.text[begin:end])
        return begin + match.end(1) if match else end

    def _answer(self, number: int) -> str:
        """The text of a message without its reasoning."""
        content = _text(self.messages[number]["content"]) or ""
        return content.rsplit(_END_OF_REASONING, 1)[-1].strip()

    def _check(self, number: int, turn: str) -> None:
        if self._answer(number) not in turn:
            raise ChatError(f"the chat template changes the text of message {number}")
        for call in self.messages[number].get("tool_calls") or ():
            name = _function(call)["name"]
            if name not in turn:
                raise ChatError(
                    f"the chat template leaves out the tool call {name!r} of message {number}"
                )


def _common_prefix(a: str, b: str) -> str:
    size = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return a[:size]


def encode_chat(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a conversation and which of them are learned.

    The ids are those of the whole text. Only where a token would lie across the bound of a turn (a
    prompt that ends in a blank, before a word) is the text cut there, as it is when a model is asked.

    Args:
        tokenizer: a fast HF tokenizer with a chat template (offsets are needed).
        messages, tools: see :func:`render_chat`.

    Returns:
        ids int64 ``[n]`` and learned bool ``[n]``.

    Raises:
        ChatError: see :func:`render_chat`; or a token lies across the bound of a turn, and the tokenizer
            does not encode the parts of a text as it does the whole.
    """
    text, spans = render_chat(tokenizer, messages, tools)
    ids, starts, ends = _encode(tokenizer, text, 0)
    bounds = np.array(spans, dtype=np.int64).ravel()
    cuts = [int(b) for b in bounds if np.any((starts < b) & (ends > b))]
    if cuts:
        edges = [0, *cuts, len(text)]
        whole = ids
        pieces = [_encode(tokenizer, text[a:b], a) for a, b in zip(edges, edges[1:], strict=False)]
        ids, starts, ends = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        if tokenizer.decode(ids) != tokenizer.decode(whole):
            raise ChatError("a token lies across the beginning or end of a turn of the assistant")
    learned = np.zeros(len(ids), dtype=bool)
    for begin, end in spans:
        learned |= (starts >= begin) & (starts < end)
    return ids, learned


def _encode(tokenizer: Any, text: str, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, and the first and last + 1 character of each, counted from ``offset``; int64 ``[n]`` each."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2) + offset
    return np.array(encoding["input_ids"], dtype=np.int64), places[:, 0], places[:, 1]


def runs(learned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and values (int8) of the runs of equal values in ``learned``."""
    edges = np.flatnonzero(np.diff(learned)) + 1
    bounds = np.concatenate([[0], edges, [len(learned)]])
    return np.diff(bounds).astype(np.int32), learned[bounds[:-1]].astype(np.int8)
