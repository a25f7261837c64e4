"""What a user runs: one analysis that answers everything, and its directory on disk."""
