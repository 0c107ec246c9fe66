"""Embeddings of documents: tokenizer, chunker, batcher, packed model, heads, and rows in corpus order."""
