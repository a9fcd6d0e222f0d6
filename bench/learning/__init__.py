"""Learning: each objective on real text against its baselines."""
