"""Star Attention over several hosts: one prompt's context on many GPUs, coordinated by Ray.

`StarLLM` is the way in. Source: Star Attention, arXiv 2411.17116.
"""

from farspan.star.llm import StarLLM
from farspan.star.output import StarOutput, StarTimes

__all__ = ["StarLLM", "StarOutput", "StarTimes"]
