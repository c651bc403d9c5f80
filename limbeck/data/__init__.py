"""Real data sets, and the loader that draws batches from them."""
