"""Trans-LoRA: what a finished run has learnt, taught to another base model on public texts."""
