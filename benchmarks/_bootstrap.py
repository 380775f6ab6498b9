"""Makes `farspan` and its plugin importable from a checkout, where nothing can be installed."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from tools.link_tree import make_link_tree


def ensure_farspan() -> None:
    """Put a link tree on sys.path and PYTHONPATH (child processes inherit it) unless `farspan` is installed."""
    if importlib.util.find_spec("farspan") is not None:
        return
    site = str(make_link_tree(Path(tempfile.mkdtemp(prefix="farspan-site-"))))
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
