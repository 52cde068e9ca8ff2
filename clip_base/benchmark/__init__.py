"""Several models on several datasets: zero-shot, probes, few shots and retrieval in one table."""
