"""Run configuration: schema, loading with did-you-mean, and comparison."""
