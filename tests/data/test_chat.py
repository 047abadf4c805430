"""Loss on answers only, for templates that rewrite earlier turns too."""

from __future__ import annotations

import pytest

from megatron_hydra.data import load_tokenizer
from megatron_hydra.data.chat import ChatError, encode_chat, render_chat, runs

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4, said 4."},
    {"role": "user", "content": "4, said 4.?"},
    {"role": "assistant", "content": "Yes."},
]
# In the manner of Qwen3: reasoning of earlier turns is dropped, the last turn gets an empty one.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1].strip() }}"
    "{% elif m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(qwen):
    loaded = load_tokenizer(qwen)
    template = loaded.chat_template
    yield loaded
    loaded.chat_template = template


def learned(tokenizer, messages) -> list[str]:
    text, spans = render_chat(tokenizer, messages)
    return [text[begin:end] for begin, end in spans]


def test_answers_and_their_closing_token_are_learned(tokenizer):
    assert learned(tokenizer, CONVERSATION) == [
        "<think>\nadd\n</think>\n\n4, said 4.<|im_end|>",
        "Yes.<|im_end|>",
    ]


def test_a_template_that_rewrites_earlier_turns(tokenizer):
    tokenizer.chat_template = REWRITING
    assert learned(tokenizer, CONVERSATION) == [
        "4, said 4.<|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]


@pytest.mark.parametrize("template", [None, REWRITING])
def test_tokens_are_those_of_the_whole_text(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    text, _ = render_chat(tokenizer, CONVERSATION)
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[mask]) == "".join(learned(tokenizer, CONVERSATION))


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    assert learned(tokenizer, [{"role": "assistant", "content": "Hi."}]) == [
        "<|im_start|>assistant\nHi.<|im_end|>"
    ]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "x"}], "no message of the assistant"),
        ([{"content": "x"}], "has no role"),
        (["x"], "has no role"),
        ([{"role": "assistant", "content": None}], "no text content"),
    ],
)
def test_malformed_conversations_say_why(tokenizer, messages, reason):
    with pytest.raises(ChatError, match=reason):
        render_chat(tokenizer, messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "refused it.*no system role"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "precedes"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the text"),
    ],
)
def test_unsuitable_templates_say_why(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(ChatError, match=reason):
        render_chat(tokenizer, CONVERSATION)


def test_runs():
    import numpy as np

    lengths, values = runs(np.array([False, False, True, False]))
    assert (lengths.tolist(), values.tolist()) == ([2, 1, 1], [0, 1, 0])


@pytest.mark.parametrize("answer", ["k", "think", "in", "<think>", ""])
def test_a_short_answer_is_not_found_inside_the_template(tokenizer, answer):
    tokenizer.chat_template = REWRITING
    messages = [{"role": "user", "content": f"say {answer}"}, {"role": "assistant"}]
    messages[1]["content"] = answer
    (span,) = learned(tokenizer, messages)
    assert span in (f"<think>\n\n</think>\n\n{answer}<|im_end|>", f"{answer}<|im_end|>")


def test_what_a_template_adds_behind_the_text_is_learned_too(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool is defined %}<call>{{ m.tool }}</call>{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "ok", "tool": "clock"},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "ok"},
    ]
    assert learned(tokenizer, messages) == [
        "ok<call>clock</call><|im_end|>",
        "ok<|im_end|>",
    ]


def test_a_special_token_in_an_answer_does_not_end_it(tokenizer):
    messages = [{"role": "user", "content": "x"}]
    messages.append({"role": "assistant", "content": "a <|endoftext|> b"})
    assert learned(tokenizer, messages) == ["a <|endoftext|> b<|im_end|>"]
