"""Ordinary jobs: a loss without a teacher, and a score."""
