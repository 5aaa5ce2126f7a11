"""Making the embedded tiny checkpoint: tokenizer, throw-away vision labels, supervised warm start."""
