"""The double backward: the only place where anything is differentiated twice."""
