"""What is differentiated: parameters, losses, and the weighted mean over the data."""
