"""A LLaMA from transformers' folder as a GGUF file in float32, without its tokenizer: prompts are given as ids."""

from pathlib import Path

import torch


def write_gguf(folder: str, path: Path) -> int:
    """Write `path`; returns the size of the vocabulary.

    Raises:
        ValueError: the model is no LLaMA.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    if config.model_type != "llama":
        raise ValueError(f"{folder}: a {config.model_type} isn't written as GGUF here, only a llama is")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, head)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(found, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config.vocab_size


def interleaved(weight: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of a projection `[heads * head, hidden]` as llama.cpp rotates them: neighbours, not halves."""
    return weight.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)
