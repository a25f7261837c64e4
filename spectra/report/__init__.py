"""What people look at: figures of the results, and one page that holds them all."""
