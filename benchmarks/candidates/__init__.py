"""Who is measured: frozen blocks and models, PEFT LoRA, this project's paths, and forms written for comparison only."""
