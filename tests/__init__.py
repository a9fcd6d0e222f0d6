"""Tests: `unit` by package, `integration` (commands, whole runs, ranks, kills), `oracles` (comparison with other libraries)."""
