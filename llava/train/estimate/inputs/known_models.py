"""Language models that a dry run knows by name: no file of theirs is needed."""

from transformers import LlamaConfig, MistralConfig

KNOWN = {
    "llama-7b": LlamaConfig(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008,
                            num_attention_heads=32, max_position_embeddings=4096),
    "llama-13b": LlamaConfig(hidden_size=5120, num_hidden_layers=40, intermediate_size=13824,
                             num_attention_heads=40, max_position_embeddings=4096),
    "mistral-7b": MistralConfig(sliding_window=None),
}  # fmt: skip
"""Their files are taken to be float16."""
