"""Target and draft models: loading, and the learned parts that adapt a draft (LoRA, private expert, output head)."""
