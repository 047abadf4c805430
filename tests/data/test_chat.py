"""For every template, the loss is on answers and their end tokens only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from megatron_hydra.data.chat import ChatError, encode_chat, render_chat, runs
from megatron_hydra.hf_loading import load_tokenizer
from tests.data.chat_templates import ADDED, FAMILIES, PARTS_ONLY, SPECIAL
from tests.data.corpora import CHATML, train_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4, said 4."},
    {"role": "user", "content": "4, said 4.?"},
    {"role": "assistant", "content": "Yes."},
]
# Like Qwen3, but every last turn gets an empty reasoning before its own.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1].strip() }}"
    "{% elif m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tokenizer with the special tokens of all families."""
    folder = train_tokenizer(tmp_path_factory.mktemp("chat"))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("</tool_call>")])
    return tokenizer


@pytest.fixture
def tokenizer(loaded):
    loaded.chat_template = CHATML
    return loaded


def spans(tokenizer, messages, tools=None) -> list[str]:
    text, bounds = render_chat(tokenizer, messages, tools)
    return [text[begin:end] for begin, end in bounds]


def learned(tokenizer, messages, tools=None) -> list[str]:
    """The text of the learned tokens, for each turn."""
    ids, mask = encode_chat(tokenizer, messages, tools)
    edges = np.cumsum([0, *runs(mask)[0]])
    pieces = [ids[a:b] for a, b, own in zip(edges, edges[1:], runs(mask)[1], strict=False) if own]
    return [tokenizer.decode(piece) for piece in pieces]


def test_the_end_of_turn_of_llama_3_is_not_declared(loaded):
    assert "<|eot_id|>" not in loaded.all_special_tokens


# -- every family ---------------------------------------------------------------------------

_TEXTS = st.one_of(
    st.sampled_from(["", "4", "k", "assistant", "### user:", "in", "the of and", "a\n\nb", "x</think", "1\n2"]),
    st.text("abc 12.,:#\n", max_size=12).map(str.strip),
)  # fmt: skip


@st.composite
def _conversations(draw, alternates: bool, begins_with_assistant: bool):
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": "s: " + draw(_TEXTS)})
    if alternates:
        roles = ["user", "assistant"] * draw(st.integers(1, 3))
    else:
        roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5))
        roles.append("assistant")
        if not begins_with_assistant:
            roles.insert(0, "user")
        if draw(st.booleans()):
            roles.append("user")  # the last turn may be the user's
    return messages + [{"role": role, "content": draw(_TEXTS)} for role in roles]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_exactly_the_answers_and_their_end_of_turn_have_a_loss(name, loaded, data):
    family = FAMILIES[name]
    loaded.chat_template = family.template
    messages = data.draw(_conversations(family.alternates, family.begins_with_assistant))
    expected = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        is_last = number == len(messages) - 1
        lead = family.lead if is_last else family.early_lead
        end = family.last_end if is_last and family.last_end else family.end
        expected.append(lead + message["content"] + end)
    assert spans(loaded, messages) == expected
    ids, mask = encode_chat(loaded, messages)
    assert loaded.decode(ids[mask]) == "".join(expected)
    text, _ = render_chat(loaded, messages)
    assert loaded.decode(ids) == text


def test_the_reasoning_of_earlier_turns_is_dropped_as_the_template_drops_it(loaded):
    loaded.chat_template = FAMILIES["qwen 3"].template
    assert learned(loaded, CONVERSATION) == [
        "4, said 4.<|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]
    assert learned(loaded, CONVERSATION[:3]) == ["<think>\nadd\n</think>\n\n4, said 4.<|im_end|>"]
    loaded.chat_template = REWRITING
    assert learned(loaded, CONVERSATION) == [
        "4, said 4.<|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]


def test_reasoning_that_the_prompt_opens_and_no_turn_shows(loaded):
    loaded.chat_template = FAMILIES["deepseek"].template
    messages = [*CONVERSATION[:2], {"role": "assistant", "content": "add</think><b>4"}]
    assert learned(loaded, messages) == ["<b>4<|end_of_sentence|>"]


def test_two_answers_in_a_row_are_two_turns(tokenizer):
    messages = [
        {"role": "assistant", "content": "Hi."},
        {"role": "assistant", "content": "Well?"},
    ]
    assert learned(tokenizer, messages) == ["Hi.<|im_end|>", "Well?<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "a prompt that ends in a blank"])
def test_the_prompt_of_a_turn_is_what_a_model_is_asked_with(loaded, name):
    """This also holds if the tokenizer would join the prompt's blank and the answer's first word."""
    loaded.chat_template = FAMILIES[name].template
    ids, mask = encode_chat(loaded, CONVERSATION[:3])
    prompt = loaded.apply_chat_template(
        CONVERSATION[:2], tokenize=False, add_generation_prompt=True
    )
    assert ids[: int(np.argmax(mask))].tolist() == loaded.encode(prompt, add_special_tokens=False)


# -- tools and parts --------------------------------------------------------------------------

_CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
_TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
_WITH_TOOL = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": "Noon.", "tool_calls": None},
]
_CALL_TEXT = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'


def test_a_tool_call_is_learned_and_its_response_is_not(loaded):
    loaded.chat_template = FAMILIES["qwen 3"].template
    assert learned(loaded, _WITH_TOOL, _TOOLS) == [
        f"{_CALL_TEXT}<|im_end|>",
        "<think>\n\n</think>\n\nNoon.<|im_end|>",
    ]
    text, _ = render_chat(loaded, _WITH_TOOL, _TOOLS)
    assert "Tools: [" in text
    assert "Tools: [" not in render_chat(loaded, _WITH_TOOL)[0]


def test_a_tool_call_with_a_text_before_it(loaded):
    loaded.chat_template = FAMILIES["qwen 3"].template
    messages = [_WITH_TOOL[0], _WITH_TOOL[1] | {"content": "I look."}, *_WITH_TOOL[2:]]
    assert learned(loaded, messages)[0] == f"I look.\n{_CALL_TEXT}<|im_end|>"


def test_a_template_that_asks_whether_the_content_is_none(loaded):
    loaded.chat_template = FAMILIES["deepseek"].template
    assert learned(loaded, _WITH_TOOL) == [
        "<tool_call>clock\n{'zone': 'UTC'}</tool_call><|end_of_sentence|>",
        "Noon.<|end_of_sentence|>",
    ]


def test_a_template_without_tools_gives_a_bad_row(tokenizer):
    with pytest.raises(ChatError, match="omits the tool call 'clock' of message 1"):
        render_chat(tokenizer, _WITH_TOOL)


def test_missing_content_is_never_rendered_as_none(tokenizer):
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}",
    )
    assert learned(tokenizer, _WITH_TOOL)[0] == "clock<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, PARTS_ONLY.template])
def test_content_as_parts(tokenizer, template):
    tokenizer.chat_template = template
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "c "}, {"type": "text", "text": "d"}]},
    ]  # fmt: skip
    assert learned(tokenizer, messages) == ["c d<|im_end|>"]
    assert "a b<|im_end|>" in render_chat(tokenizer, messages)[0]


# -- templates whose answers cannot be located --------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "x"}], "no message of the assistant"),
        ([{"content": "x"}], "has no role"),
        (["x"], "has no role"),
        ([{"role": "assistant", "content": None}], "no text content"),
        ([{"role": "assistant", "content": 3}], "no text content"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "part of type 'image'"),
        ([{"role": "assistant", "content": ["x"]}], "part of type 'str'"),
        ([{"role": "assistant", "tool_calls": "x"}], "is not a list"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "a tool call of .* has no name"),
    ],
)
def test_malformed_conversations_say_why(tokenizer, messages, reason):
    with pytest.raises(ChatError, match=reason):
        render_chat(tokenizer, messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "failed.*no system role"),
        (
            "{% for m in messages %}{{ m.content | upper }};{% endfor %}",
            "cannot find begin and end",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "cannot find begin and end.*does not close it",
        ),
        (
            "{% for m in messages | reverse %}{{ m.content }};{% endfor %}",
            "cannot find begin and end|before an",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ '.' if loop.last else ';' }}{% endfor %}",
            "cannot find begin and end",
        ),
    ],
)
def test_unsuitable_templates_say_why(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(ChatError, match=reason):
        render_chat(tokenizer, CONVERSATION)


def test_runs():
    lengths, values = runs(np.array([False, False, True, False]))
    assert (lengths.tolist(), values.tolist()) == ([2, 1, 1], [0, 1, 0])


@pytest.mark.parametrize("answer", ["k", "think", "in", "<think>", ""])
def test_a_short_answer_is_not_found_inside_the_template(tokenizer, answer):
    tokenizer.chat_template = REWRITING
    messages = [
        {"role": "user", "content": f"say {answer}"},
        {"role": "assistant", "content": answer},
    ]
    assert spans(tokenizer, messages) == [f"<think>\n\n</think>\n\n{answer}<|im_end|>"]


def test_text_that_a_template_adds_after_the_answer_has_a_loss(tokenizer):
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if m.tool is defined %}<call>{{ m.tool }}</call>{% endif %}",
    )
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "ok", "tool": "clock"},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "ok"},
    ]
    assert learned(tokenizer, messages) == ["ok<call>clock</call><|im_end|>", "ok<|im_end|>"]


def test_a_special_token_in_an_answer_does_not_end_it(tokenizer):
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "a <|endoftext|> b"},
    ]
    assert learned(tokenizer, messages) == ["a <|endoftext|> b<|im_end|>"]
