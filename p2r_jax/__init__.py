"""Perceive-to-Reason in JAX: rollouts, PRA-GRPO training, evaluation and export of Qwen3-VL."""

import os

__version__ = "0.1.0"

# transformers advises installing torch at import; only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
