"""The command line `graphlora`: train, evaluate, generate, info, import."""
