"""Scripts behind the Makefile; none of them is installed."""
