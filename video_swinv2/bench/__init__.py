"""Benchmarks of models, training, loading and testing against other implementations; one file each."""
