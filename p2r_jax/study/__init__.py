"""Controlled comparisons: several arms, several seeds, one table with tests (`p2r study`).

config.py      what a study compares, from YAML
run.py         one process for each arm and seed, resumable
results.py     what finished runs say: verdicts, curves, costs
statistics.py  intervals, tests, equivalence
analysis.py    study.json
table.py       Markdown for study.md and a README
report.py      an HTML page
"""

EXIT_RESTART = 75
"""Of a process that is to be started again; that of `rl.stop`, which `tied` must not import."""
