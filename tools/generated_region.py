"""Text between two markers of a page, written by a program instead of by hand."""


def replace_region(page: str, begin: str, end: str, content: str) -> str:
    """The page with the text between its two markers replaced.

    begin, end: the markers with their line ends, as they are in the page; content: ends with a line end. Raises
    ValueError where the page lacks a marker.
    """
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page has no {end if found_begin else begin!r}; put it back")
    return f"{before}{begin}{content}{end}{after}"
