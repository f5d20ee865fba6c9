"""The grammar of the embedded stories: one engine, two languages."""
