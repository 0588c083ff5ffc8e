"""Benchmarks of smartfrz_hf. Run them from the root of the repository, such as `python -m benchmarks.speed.step_time`."""
