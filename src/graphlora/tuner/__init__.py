"""The PEFT tuner: configuration, adapted layers, losses and state."""
