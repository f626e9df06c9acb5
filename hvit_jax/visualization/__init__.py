"""Pictures of what a method does with a picture's patches."""
