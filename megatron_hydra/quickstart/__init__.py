"""Models and tasks of the quickstart and the tiny experiments: a teacher that trains in minutes.

``shipped`` finds the package's teacher, which ``teacher`` has trained. ``vocabulary`` has its tokens. ``tasks``
generates its training data and questions. ``experiments.quickstart`` runs the method on it.
"""
