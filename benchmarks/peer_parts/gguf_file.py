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

    from llava.model.gguf.names import rotary_pairs
    from llava.model.gguf.writer import add_sizes

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    if config.model_type != "llama":
        raise ValueError(f"{folder}: a {config.model_type} isn't written as GGUF here, only a llama is")
    writer = gguf.GGUFWriter(path, "llama")
    add_sizes(writer, config)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("q_proj.weight"):
            weight = rotary_pairs(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = rotary_pairs(weight, config.num_key_value_heads)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(found, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config.vocab_size
