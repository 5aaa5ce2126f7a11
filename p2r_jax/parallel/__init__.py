"""Meshes and shardings: the only place that knows device layouts."""
