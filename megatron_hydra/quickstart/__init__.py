"""The whole chain of design §1 on a tiny model, two CPU cores and a few minutes.

``tasks`` generates the data, ``teacher`` trains the shipped dense model, ``run`` walks the chain.
"""
