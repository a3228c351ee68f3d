"""Training with transformers' Trainer and TRL: what is frozen, which loss, which parameter groups."""
