"""Candidates with a teacher's scores for every query; thresholds are cut later, at load time."""
