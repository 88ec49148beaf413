"""The benchmarks: `make bench`, or `python -m bench`. Results in build/bench.json, a table, plots under build/."""
