"""Small chat templates in the style of the common model families."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """A template and how it writes a turn.

    Attributes:
        template: Jinja.
        end: text after an assistant's turn that is not the last one.
        last_end: text after the last turn; empty: as ``end``.
        lead: text between the prompt and the last turn.
        early_lead: text between the prompt and any other turn.
        alternates: whether roles must alternate, with the user first.
        begins_with_assistant: whether the assistant may speak first.
        bos: text before the conversation; the loss never includes it.
    """

    template: str
    end: str
    last_end: str = ""
    lead: str = ""
    early_lead: str = ""
    alternates: bool = False
    begins_with_assistant: bool = True


_CHATML = (
    "{% for m in messages %}DEFAULT<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
)
_QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'assistant' %}"
    "{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% if not loop.first or content %}{{ '\n' }}{% endif %}"
    "<tool_call>\n{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# As Mistral-7B-Instruct-v0.3: the system prompt moves to the last message of the user.
_MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set loop_messages = "
    "messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}<s>"
    "{% for m in loop_messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if m.role == 'user' %}"
    "[INST] {% if loop.index0 >= loop_messages | length - 2 and system is defined and (loop.last or "
    "loop.revindex0 == 1) %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# As DeepSeek-R1: the prompt opens the reasoning, which earlier turns do not show.
_DEEPSEEK = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.content is none %}<|Assistant|>"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}\n{{ call.function.arguments }}"
    "</tool_call>{% endfor %}<|end_of_sentence|>"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>"
    "{% else %}<|tool|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_TEXT = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% else %}</s>{% endif %}"
)
_BLANK = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILIES = {
    "chatml": Family(_CHATML.replace("DEFAULT", ""), "<|im_end|>"),
    "chatml with a default system prompt": Family(
        _CHATML.replace("DEFAULT", _DEFAULT_SYSTEM), "<|im_end|>"
    ),
    "llama 3": Family(_LLAMA3, "<|eot_id|>"),
    "qwen 3": Family(_QWEN3, "<|im_end|>", lead="<think>\n\n</think>\n\n"),
    "mistral": Family(
        _MISTRAL, "</s>", lead=" ", early_lead=" ", alternates=True, begins_with_assistant=False
    ),
    "deepseek": Family(_DEEPSEEK, "<|end_of_sentence|>"),
    "text only": Family(_TEXT, "\n\n", last_end="\n\n</s>"),
    "a prompt that ends in a blank": Family(_BLANK, "</s>"),
    "zephyr": Family(_ZEPHYR, "</s>"),
}
PARTS_ONLY = Family(_PARTS_ONLY, "<|im_end|>")
SPECIAL = ["<|im_start|>", "<|im_end|>", "</s>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"]
"""Special tokens that the tokenizer declares."""
ADDED = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
"""Special in the tokenizer's file, but not among its ``all_special_tokens`` (as Llama 3's)."""
