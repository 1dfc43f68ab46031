"""Full-size tests of what the project promises; each writes a record for `docs/reliability.md`."""
