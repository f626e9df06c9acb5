"""Pure operations on tokens: arrays first, static sizes by keyword, no parameters."""
