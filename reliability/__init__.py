"""What the project promises about scale and trust, the commands that measure it, and the table of what they found.

`python -m reliability` prints the table and renews it in `docs/reliability.md`; `python -m reliability run NAME`
measures a promise at full size and writes its record to `results/reliability/NAME.json`. Not part of the package.
"""
