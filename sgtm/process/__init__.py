"""Facts about this process: its rank, cores and signals; and names that users mistype. Imports nothing of sgtm."""
