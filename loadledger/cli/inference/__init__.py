"""`loadledger infer`: inputs from arguments and files, outputs as a summary, JSON or a file.

    command.py    the command and its options
    sources.py    arguments and files -> values, read within limits
    arrays.py     values -> arrays that fit the declared inputs
    images.py     pictures -> arrays
    results.py    outputs -> summary, JSON or a file

Only command.py and sources.py are imported at once: the others import numpy.
"""
