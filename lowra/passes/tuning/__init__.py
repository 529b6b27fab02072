"""Training within a compile: blocks against the original, and models end to end."""
