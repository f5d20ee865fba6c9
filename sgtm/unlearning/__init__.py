"""What masking is compared with: removing a domain from a model that was trained on it, and adding one in adapters."""
