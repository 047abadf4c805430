"""Tokenise conversations, with loss only on the assistant's turns.

The tokenizer's chat template renders the whole conversation once. The template is also applied to the
messages before a turn with a generation prompt: the end of this text is the beginning of the turn. It is
also applied to the messages up to the turn: the end of this text is the end of the turn. Some templates
render a message differently if others follow, and this module handles them: Qwen3 removes the reasoning of
earlier turns, Mistral moves the system prompt to the last user message, others write the end token only
after the last turn. If the bounds of a turn cannot be found, the row is a bad row.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

_MARK = "QvMarkOfHydraHeadvQ"
"""Text that no template changes and no conversation contains. It marks a position in a message."""
_END_OF_REASONING = "</think>"


class ChatError(ValueError):
    """A conversation that cannot be rendered; the message gives the reason."""


def render_chat(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation and the character spans of the assistant's turns.

    Args:
        tokenizer: with a chat template.
        messages: dicts ``{"role": …, "content": …}`` with roles of the template. The content is a
            string or a list of text parts. With ``tool_calls`` it may be missing.
        tools: descriptions of the tools, which the template shows to the model.

    Raises:
        ChatError: messages are malformed, no turn is the assistant's, or the template is unsuitable.
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
        ChatError: messages are malformed, or the template refuses them or omits the last one.
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
    raise error or ChatError("the chat template omits the last message")


def _checked(message: Any) -> dict[str, Any]:
    """A message without empty fields. Tables add them if another row has the field."""
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
    """Name and arguments of a tool call, which may be in a nested mapping."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _variants(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None
) -> list[list[dict[str, Any]]]:
    """The forms of one conversation to try, in order, because templates expect different forms.

    Text parts are joined for a template that supports only strings. They stay parts for a template that
    supports only parts. Missing content stays missing for a template that tests for it. It becomes an empty
    string for a template that would print "None".
    """
    joined = [message | {"content": _text(message["content"])} for message in messages]
    variants = [joined]
    if any(message["content"] is None for message in messages):
        filled = [message | {"content": message["content"] or ""} for message in joined]
        try:
            prints_none = _apply(tokenizer, joined, tools).count("None") > _apply(
                tokenizer, filled, tools
            ).count("None")
        except ChatError:  # the template refuses one of the forms
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
        # apply_chat_template would remove the key, but some templates test whether it is none.
        (text,), _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            add_generation_prompt=reply,
            **tokenizer.special_tokens_map,
        )
        return text
    except Exception as error:  # templates can raise any error
        raise ChatError(f"the chat template failed: {error}") from error


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> str:
    """A pattern that matches one special token, including tokens that are declared only as added tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return "(?:" + "|".join(re.escape(token) for token in longest_first) + ")" if tokens else "(?!)"


class _Conversation:
    """One conversation in a form that its template can render."""

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
                f"cannot find begin and end of message {number}: the chat template changes its text, does not "
                "close it, or renders it differently when other messages follow"
            )
        begin, end = found
        end = self._without_blanks(begin, end)
        self._check(number, self.text[begin:end])
        return begin, end

    # -- the beginning of a turn --------------------------------------------------------------

    def _prompt(self, number: int) -> str | None:
        """The prompt that message ``number`` answers; ``None`` if it cannot be rendered."""
        try:
            return self._render(self.messages[:number], reply=True)
        except ChatError:  # many templates require a certain first message
            return None

    def _begin(self, number: int, prompt: str | None) -> int | None:
        """The end of the prompt in the text.

        A prompt may end in text that the template removes from earlier turns ("<think>"). Then the result is
        the end of the prompt's last special token or line that the text contains.
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
        """Find the turn as the end of ``until_here``. The template may remove its beginning (reasoning)."""
        rest = self.text[begin:]
        answer = self._answer(number)
        for turn in self._without_end_tokens(until_here[begin:]):
            for start in range(len(turn)):
                part = turn[start:]
                if rest.startswith(part):
                    is_closed = not answer or not part.endswith(answer)
                    if answer in part and is_closed:
                        return begin, begin + len(part)
                    break  # shorter ends do not contain the answer either
        return None

    def _without_end_tokens(self, turn: str) -> list[str]:
        """The turn with and without special tokens at its end, which may close the whole conversation."""
        turns = [turn]
        while match := re.search(rf"{self.special}\s*$", turns[-1]):
            turns.append(turns[-1][: match.start()])
        return turns

    # -- by a mark in the message ---------------------------------------------------------------

    def _by_mark(self, number: int) -> tuple[int, int] | None:
        """Find the turn by marks before and after its text. The content must be a string."""
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
        """Position of ``offset`` of a message's text in ``count`` rendered messages, and the text after it."""
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
        """The beginning of the answer, including text that the template puts between prompt and answer."""
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
        """The text that the template appends as generation prompt; ``None`` if it cannot be found."""
        question = [{"role": "user", "content": "x"}]
        try:
            plain, asked = self._render(question), self._render(question, reply=True)
        except ChatError:
            return None
        fitting = (len(p) for p in self._without_end_tokens(plain) if asked.startswith(p))
        size = next(fitting, None)
        return None if size is None else asked[size:]

    # -- checks --------------------------------------------------------------------------------------

    def _without_blanks(self, begin: int, end: int) -> int:
        """The end without the line break after a closing special token, which a model never generates."""
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
                    f"the chat template omits the tool call {name!r} of message {number}"
                )


def _common_prefix(a: str, b: str) -> str:
    size = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return a[:size]


def encode_chat(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a conversation, and a mask of the tokens with a loss.

    The whole text is encoded at once. Only if a token would cross the bound of a turn (for example a prompt
    that ends in a space, before a word), the text is cut at the bound, as in inference.

    Args:
        tokenizer: a fast HF tokenizer with a chat template (offsets are needed).
        messages, tools: see :func:`render_chat`.

    Returns:
        ids int64 ``[n]``, and bool ``[n]``, true for tokens with a loss.

    Raises:
        ChatError: see :func:`render_chat`; or a token crosses the bound of a turn, and the tokenizer
            encodes parts of a text differently from the whole.
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
            raise ChatError("a token crosses the beginning or end of a turn of the assistant")
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
