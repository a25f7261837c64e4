"""One file a question, asked of any symmetric operator through products and inner products."""
