"""Evaluation: benchmarks, scoring with intervals, the runner and the HTML report."""
