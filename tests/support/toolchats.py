"""Chat templates that write tool calls as model families do, for the tiny tokenizer."""

import copy

START = "{%- for m in messages %}{%- if m.role == 'tool' %}"
QWEN = (
    "{%- if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    + START
    + "{%- if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{%- else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    '{%- for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{%- if tools is not none %}<|head|>system\n{{ tools | tojson }}<|eot_id|>{% endif %}"
    + START
    + "<|head|>ipython\n{{ m.content | tojson }}<|eot_id|>"
    "{%- elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    '<|head|>assistant\n{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>"
    "{%- else %}<|head|>{{ m.role }}\n{{ m.content | trim }}<|eot_id|>{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)
HARMONY = (
    "{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    + "{%- set ns = namespace(name='') %}"
    + START
    + "<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{%- elif m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "<|start|>assistant to=functions.{{ ns.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{%- elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TAGS = (
    "{%- for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = (
    *("<|head|>", "<|eot_id|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"),
    *("<|user|>", "<|assistant|>", "<|tool|>"),
)


def tokenizer_with(tokenizer, template):
    """A copy of a tokenizer with the special tokens of these templates and one of them; None: its own template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer
