"""Training: data, the step, the loop, checkpoints, evaluation and generation.

Everything here also works in a ten-line loop of your own; `fit` is the convenience that the command line uses.
"""
