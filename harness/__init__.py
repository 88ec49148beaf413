"""What the tests, the proof and the benchmarks have in common: servers of their own, and a command line."""
