"""An NVFlare job: MiniLM, TREC questions, PEFT, and a LoRA rank for each site."""
