"""The features, each in a folder of its own, and the lists by which they enter the product.

The kernel (the log, the scheduler, the consumer, workers, the store) knows no feature. It has seams, and for
each seam a list in this folder, with one line for each feature that is there. A module of a feature may
import whatever lies below the seam that it serves, so `events` never reaches a feature's routes.
"""
