"""The words of limbeck. This layer imports torch and nothing of ours."""
