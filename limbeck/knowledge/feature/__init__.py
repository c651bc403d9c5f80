"""Features: what a teacher shows on the way to its answer."""
