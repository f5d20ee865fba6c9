"""The transformer and its row layout."""
