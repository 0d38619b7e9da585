"""Prompt templates as data: `get_template(name)` gives a fresh `Conversation` that renders as the reference does."""

from llava.conversation.rendering import Conversation, Segment, SeparatorStyle
from llava.conversation.templates import (
    RELEASES,
    conv_templates,
    default_conversation,
    get_template,
    template_names,
)

__all__ = [
    "RELEASES",
    "Conversation",
    "Segment",
    "SeparatorStyle",
    "conv_templates",
    "default_conversation",
    "get_template",
    "template_names",
]
