"""Self-contained HTML reports of runs: charts, tables and samples."""
