"""The world of the quickstart and of the tiny experiments: a teacher that trains in minutes, and its tasks.

``shipped`` finds the teacher that comes with the package, which ``teacher`` has trained; ``vocabulary`` has its
tokens; ``tasks`` generates what it learns and is asked. ``experiments.quickstart`` runs the method on it.
"""
