"""Dynamic block selection (FlexPrefill): estimate, select, measure what was kept; each with its reference."""
