"""Who teaches whom, in what order: one lesson plan a file."""
