"""The frozen base model: a LLaMA/Qwen decoder in Flax, and its weights from HF folders, hub ids and GGUF files."""

import os

# transformers is here for tokenizers only; without this it tells every user that torch is missing
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
