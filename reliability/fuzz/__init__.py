"""Structure-aware fuzzing of all that reads files of others: `python -m reliability.fuzz READER --count N`.

Inputs start from valid documents whose fields, types, values, sizes and bytes are then changed, so that most get past
the parser and reach the validators. An input passes when it is accepted or refused with a `GraphLoraError` of one line;
every other exception, a crash, or more than `SLOW` seconds is a bug, and its input goes to `tests/fuzz/corpus`.
"""
