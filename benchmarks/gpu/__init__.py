"""The check of a GPU: stages in processes of their own, each with a limit of time.

``python -m benchmarks.gpu --out DIR`` runs them; ``python -m benchmarks.gpu.table DIR`` stores the results.
"""
