"""Kernels for NVIDIA Hopper alone, in Gluon: the copy engine feeds asynchronous tensor core products."""
