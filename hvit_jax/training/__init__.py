"""Training and fine-tuning: augmentation, optimiser, loop, command line."""
