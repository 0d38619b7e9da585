"""A prompt template as Jinja text (`chat_template.jinja`), for programs that know transformers' layout alone.

It renders OpenAI-style messages (texts, and lists of text and image parts) to the very text that
`Conversation.get_prompt` gives.
"""

import json

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle

_CONTENT = """{%- macro content(message) -%}
{%- if message['content'] is string -%}{%- set text = message['content'] -%}{%- set count = 0 -%}
{%- else -%}
{%- set parts = namespace(text='', plain='', count=0) -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ['image', 'image_url'] -%}
{%- set parts.count = parts.count + 1 -%}{%- set parts.text = parts.text + IMAGE -%}
{%- elif part['type'] == 'text' -%}
{%- set parts.text = parts.text + part['text'] -%}{%- set parts.plain = parts.plain + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- if IMAGE_FIRST and parts.count == 1 -%}
{%- set text = (IMAGE + GLUE + parts.plain | trim) if parts.plain | trim else IMAGE -%}
{%- else -%}{%- set text = parts.text -%}{%- endif -%}
{%- endif -%}
{{- text -}}
{%- endmacro -%}
"""

_HEAD = """{%- set system = namespace(text=SYSTEM) -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set given = messages[0]['content'] -%}
{%- set system.text = MARK + (given if given is string else given | map(attribute='text') | join('\\n')) -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set turns = messages -%}
{%- endif -%}
"""

_BODIES = {
    SeparatorStyle.SINGLE: """{{- BOS + system.text + SEP + EXAMPLES -}}
{%- for message in turns -%}
{{- (ANSWERER if message['role'] == 'assistant' else ASKER) + ': ' + content(message) + SEP -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ANSWERER + ':' -}}{%- endif -%}""",
    SeparatorStyle.TWO: """{{- BOS + system.text + SEP + EXAMPLES -}}
{%- for message in turns -%}
{%- set text = content(message) | trim if STRIP else content(message) -%}
{%- if message['role'] == 'assistant' -%}
{{- ANSWERER + ': ' + text + END + (SEP if STRIP and not (loop.last and not add_generation_prompt) else '') -}}
{%- else -%}{{- ASKER + ': ' + text + ('' if STRIP and loop.last and not add_generation_prompt else SEP) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ANSWERER + ':' -}}{%- endif -%}""",
    SeparatorStyle.LLAMA_2: """{{- BOS -}}
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}{{- ' ' + content(message) + ' ' + END -}}
{%- elif loop.first -%}
{%- set opening = '<<SYS>>\\n' + system.text + '\\n<</SYS>>\\n\\n' if system.text else '' -%}
{{- '[INST] ' + opening + content(message) + ' [/INST]' -}}
{%- else -%}{{- SEP + '[INST] ' + content(message) + ' [/INST]' -}}
{%- endif -%}
{%- endfor -%}""",
    SeparatorStyle.MPT: """{{- BOS + (system.text + SEP if system.text else '') -}}
{%- for message in turns -%}
{{- (ANSWERER if message['role'] == 'assistant' else ASKER) + content(message) + SEP -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ANSWERER -}}{%- endif -%}""",
    SeparatorStyle.PLAIN: """{{- BOS + system.text -}}
{%- for message in turns -%}{{- content(message) + SEP -}}{%- endfor -%}""",
}


def chat_template(conversation: Conversation, image_text: str, bos: bool = False, glue: str = "\n") -> str:
    """The Jinja text of an unused template.

    Args:
        image_text: what stands for one image, `<image>` with what the checkpoint wants around it.
        bos: begin with the tokenizer's begin token.
        glue: what stands between a turn's image and its text.
    """
    image = conversation.place_images(DEFAULT_IMAGE_TOKEN).replace(DEFAULT_IMAGE_TOKEN, image_text)
    examples = ""
    if conversation.sep_style in {SeparatorStyle.SINGLE, SeparatorStyle.TWO}:
        whole = conversation.get_prompt()
        start = len(conversation.system) + len(conversation.sep)
        examples = whole[start:]
    constants: dict[str, str | bool] = {
        "SYSTEM": conversation.system,
        "MARK": conversation.system_mark,
        "ASKER": conversation.roles[0],
        "ANSWERER": conversation.roles[1],
        "SEP": conversation.sep,
        "END": conversation.sep2 or "",
        "EXAMPLES": examples,
        "STRIP": conversation.strip_turns,
        "IMAGE": image,
        "IMAGE_FIRST": conversation.image_first,
        "GLUE": glue,
    }
    lines = [f"{{%- set {name} = {_literal(value)} -%}}" for name, value in constants.items()]
    lines.append(f"{{%- set BOS = {'bos_token' if bos else _literal('')} -%}}")
    return "\n".join(lines) + "\n" + _CONTENT + _HEAD + _BODIES[conversation.sep_style]


def _literal(value: str | bool) -> str:
    """Jinja reads JSON's strings and booleans; non-ASCII text stays as it is."""
    return json.dumps(value, ensure_ascii=False)
