"""Speed, memory, exactness: this library beside what else computes the same.    python -m bench --help

Needs torch and numpy alone; what is not installed (pymatgen, vesin, the paper's code, a GPU) is reported as absent.
"""
