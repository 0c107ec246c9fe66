"""From documents to embeddings: tokenizer, chunker, batcher, packed model, heads, and rows back in corpus order."""
