"""Array operations: one function per idea, an XLA reference first, kernels behind it."""
