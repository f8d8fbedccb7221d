"""The benchmark suite: one table for each question, every peer measured in the same run."""
