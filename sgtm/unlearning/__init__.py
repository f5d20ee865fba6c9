"""Post-hoc unlearning: what removes a domain from a model that was trained on it, to compare masking with."""
