"""Making the embedded tiny checkpoint: tokenizer, throw-away labels, supervised warm start."""
