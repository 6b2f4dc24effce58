"""The GPU check: stages in separate processes, each with a time limit.

``python -m benchmarks.gpu --out DIR`` runs them; ``python -m benchmarks.gpu.table DIR`` stores the results.
"""
