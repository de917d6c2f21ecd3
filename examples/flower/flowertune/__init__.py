"""An app as FlowerTune's: one LoRA rank for all, FedAvg of A and of B. ``flexlora.diff`` gives each node its own."""
