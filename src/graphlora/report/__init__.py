"""Pictures of runs and adapters. Imports no torch."""
