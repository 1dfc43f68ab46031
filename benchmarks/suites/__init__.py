"""One module per suite of the registry; each has `measure(context)`."""
