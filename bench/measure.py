"""Times and memory of calls, taken in turn."""

import ctypes
import gc
import math
import re
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]
MAX_RUNS, MIN_RUNS = 50, 3
WARM_UP = 2
SHORT = 0.05  # seconds


def clock(call: Call, device: torch.device) -> float:
    """Milliseconds of one call: on a GPU between two CUDA events, after it has come to rest."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return float(start_event.elapsed_time(end_event))


def alternate(calls: Mapping[Key, Call], device: torch.device, seconds: float) -> dict[Key, list[float]]:
    """Milliseconds of each call, all of them in turn, so that a change of the machine's speed meets every one.

    Args:
        seconds: about how long each call is measured, with at least 3 and at most 50 runs; after a warm-up of two.
            A call that takes longer than this is run twice, and its second run counts; one of five times that, once.
            A short call is timed right after an untimed one of its own, as in a model, where block follows block:
            else it pays for the caches and the idle threads that a provider a thousand times slower leaves behind.
    """
    runs, short = {}, set()
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for key, call in calls.items():
        spent = [clock(call, device)]
        if spent[0] > 5e3 * seconds:  # what was verified has run before
            runs[key], times[key] = 0, spent
            continue
        if spent[0] < 1e3 * seconds:
            spent += [clock(call, device) for _ in range(WARM_UP - 1)]
        once = min(spent) / 1e3
        if once < SHORT:
            short.add(key)
        runs[key] = 1 if once > seconds else max(MIN_RUNS, min(MAX_RUNS, int(seconds / max(once, 1e-6))))
    turns = max(runs.values(), default=0)
    for turn in range(turns):
        for key, call in calls.items():
            if turn * runs[key] // turns != (turn - 1) * runs[key] // turns:  # spread evenly over the turns
                if key in short:
                    call()
                times[key].append(clock(call, device))
    return times


def captured(call: Call) -> Call:
    """The replay of what `call` starts on the GPU, as a CUDA graph; it returns what the call did, filled anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def peak_memory(call: Call, device: torch.device) -> float:
    """MiB that a call takes at most, besides what is there before; NaN where that cannot be told.

    On a GPU by torch's allocator. On Linux by the resident memory of the process, whose peak is reset before the call,
    after unused memory has been given back: it counts what any library takes.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0.0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        call()
        return math.nan


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024
