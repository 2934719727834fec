"""Tests of how the Triton kernels are launched and what they read: on a GPU, in Triton's interpreter, or by `make ptx`.

Where the kernels cannot run in this process they are not collected; test_interpreter.py runs them in one of its own.
"""

import crystalformer as cf

collect_ignore_glob = [] if cf.available_backends()["triton"] is True else ["test_*.py"]
