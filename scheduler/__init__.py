"""Pure-Python scheduling and placement decisions; nothing here needs torch or a GPU."""
