"""Responses: what a teacher answers."""
