"""Conversation + tokenizer → ids and labels: the one renderer for training, validation and inference.

Needs neither torch nor a model; a tokenizer is any Hugging Face tokenizer.
"""

from llava.tokenization.batches import expand_images, pad_batch, truncate
from llava.tokenization.encoder import tokenize_prompt
from llava.tokenization.image_tokens import ImageTokens
from llava.tokenization.samples import (
    Encoded,
    conversation_from_record,
    encode_conversation,
    encode_prompt,
    render_prompt,
    stop_token_ids,
)

__all__ = [
    "Encoded",
    "ImageTokens",
    "conversation_from_record",
    "encode_conversation",
    "encode_prompt",
    "expand_images",
    "pad_batch",
    "render_prompt",
    "stop_token_ids",
    "tokenize_prompt",
    "truncate",
]
