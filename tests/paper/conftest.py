"""Properties are tried on the same examples every time, however slow the machine is."""

from hypothesis import settings

settings.register_profile("paper", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("paper")
