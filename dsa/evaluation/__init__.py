"""What a model predicts on held-out rows, and what it finds again in a long context."""
