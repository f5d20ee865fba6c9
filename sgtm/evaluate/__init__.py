"""What a trained model knows, with and without its forget groups."""
