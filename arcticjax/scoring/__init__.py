"""Retrieval tasks, trec_eval's metrics over rankings, and what an embedding function scores."""
