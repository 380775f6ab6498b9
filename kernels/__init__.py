"""Attention kernels on paged KV: Triton and PyTorch, importing nothing else of farspan."""

# transformers takes any importable top-level module `kernels` for the package of that name and asks for its version;
# with the repository as the current directory it finds this folder, and "0.0.0" tells it that the package is not there.
__version__ = "0.0.0"
