"""The PEFT tuner: configuration, adapted layers, losses and state."""

# Importing PEFT registers the tuner, which imports the modules of this package: it must come before any of them.
import peft as _peft  # noqa: F401
