"""Federated fine-tuning inside Hugging Face's own training loops: ``python -m examples.hf`` and ``… --sft``."""
