"""What the benchmarks share is imported from here: bench.memory, bench.ablate."""
