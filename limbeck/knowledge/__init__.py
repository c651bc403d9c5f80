"""What is taught: response, feature, relation. One paper, one file."""
