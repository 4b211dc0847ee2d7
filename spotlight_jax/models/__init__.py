"""The frozen base model: a LLaMA/Qwen decoder in Flax, and its weights from HF folders, hub ids and GGUF files."""
