"""Certify: the same small run on every topology and with every tuner, compared with one process.

``shrinking`` makes the user's model small, ``grid`` says which cells there are, ``cell`` trains one of them on its
ranks, ``comparing`` finds the worst error, ``outside`` asks transformers and peft, ``report`` shows what came out.
"""
