"""Benchmarks against peers; results go to benchmarks/results, tables to docs/performance.md."""
