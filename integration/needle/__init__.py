"""The small bundled retrieval model, its tokenizer and its task generator."""
