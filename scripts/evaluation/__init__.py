"""Measure retrieval quality: data sets, tables, the published protocol, the demo model's heads."""
