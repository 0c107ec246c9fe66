"""The input: find sources, cut shards, parse rows as documents; pairs, TREC runs and judgements."""

"""The input: find sources, cut shards, parse rows as documents; pairs, TREC runs and judgements."""
