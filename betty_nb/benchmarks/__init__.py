"""Workloads, the loops one writes by hand for them, and what the library costs in comparison."""
