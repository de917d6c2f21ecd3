"""A Flower app: MiniLM, TREC questions, PEFT, and a LoRA rank for each node."""
