"""Cold KV heads: their pages in slots of GPU memory and in host memory."""
