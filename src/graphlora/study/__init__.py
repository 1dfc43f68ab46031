"""Studies: one file names variants, tasks and seeds; one command runs what is missing."""
