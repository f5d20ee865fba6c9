"""The command line: one file for each command, its options beside what it runs."""
