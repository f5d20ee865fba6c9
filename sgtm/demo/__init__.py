"""A local page on which a person switches domains of a run off and on."""
