"""Readers and writers of what a run measured: metrics.jsonl, the optional tracker, and the HTML report."""
