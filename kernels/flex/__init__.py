"""Dynamic block selection, by sampled rows or as in FlexPrefill, and what it kept; each with its reference."""
