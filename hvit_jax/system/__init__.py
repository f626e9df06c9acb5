"""What every tool needs of the operating system: files, signals, memory, provenance."""
