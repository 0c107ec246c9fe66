"""Commands: one module or package each, above encoder, corpus and store."""
