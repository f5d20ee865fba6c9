"""Whether an exported folder is what it says: held against the run that it was made from."""
