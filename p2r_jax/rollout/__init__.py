"""Sampling: the prompt once, its G completions against one shared prefix."""
