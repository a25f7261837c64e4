"""Symmetric operators: torch inside, SciPy's LinearOperator outside."""
