"""SGTM inside models and trainers of other libraries: `sgtm.integrations.hf`, `sgtm.integrations.torchtitan`."""
