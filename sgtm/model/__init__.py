"""The transformer, its row layout, and its Hugging Face twins."""
