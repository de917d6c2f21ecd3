"""The mathematics: truncated singular value decompositions of sums of low-rank terms.

``solve`` is the one entry; ``plan`` chooses, ``gram``, ``krylov``, ``subspace`` and ``dense`` do the work.
"""
