"""report: one self-contained page with every curve, table and sample of a run."""
