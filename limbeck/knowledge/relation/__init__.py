"""Relations: what a teacher knows of samples, positions or layers to one another."""
