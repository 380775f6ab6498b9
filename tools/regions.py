"""The generated parts of our pages: between two marker lines, replaced by the tools that make them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from farspan.command import run_command


@dataclass(frozen=True)
class Region:
    """What is between two marker lines of a page, the markers not included."""

    page: Path
    begin: str
    """The marker line before; names the command that generates the region."""
    end: str
    """The marker line after."""

    def replace(self, page_text: str, text: str) -> str:
        """The page with `text` between the markers. Raises ValueError where the page lacks a marker."""
        before, begin, rest = page_text.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not (begin and end):
            raise ValueError(f"{self.page} has lost its markers {self.begin!r} and {self.end!r}")
        return f"{before}{begin}{text}{end}{after}"

    def is_current(self, text: str) -> bool:
        """Whether the page has `text` between the markers."""
        page_text = self.page.read_text()
        return self.replace(page_text, text) == page_text

    def write(self, text: str) -> None:
        """Put `text` between the markers."""
        self.page.write_text(self.replace(self.page.read_text(), text))

    def serve(self, program: str, make: Callable[[], str]) -> int:
        """Be the program that makes the region: print it, or with `--write` put it into the page.

        Returns the exit status.
        """
        parser = argparse.ArgumentParser(prog=program)
        parser.add_argument("--write", action="store_true", help=f"put it into {self.page.name} instead of printing it")
        write = self.write if parser.parse_args().write else print
        return run_command(program, lambda: write(make()))
