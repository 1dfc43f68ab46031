"""How fast and how big: interleaved timing, memory of a stretch of work, models with random weights, predictions."""
