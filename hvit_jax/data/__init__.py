"""Pictures: where they lie, how they are prepared, and how they reach the device."""
