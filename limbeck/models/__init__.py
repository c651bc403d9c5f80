"""Networks, one architecture a file; each states its taps, its stages and its tails."""
