"""GGUF files, as llama.cpp, Ollama and LM Studio load them: read into folders, and written from checkpoints."""
