"""How much memory a call takes at its peak, to the byte."""

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

# Torch's profiler talks on stderr. It reads this when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

from torch.profiler import ProfilerActivity, profile


def peak(call: Callable[[], object]) -> int:
    """The most bytes that `call` holds at once, of those that it allocates for tensors.

    The CPU allocator has no counter of its peak, but it tells the profiler of every allocation and release,
    those inside an operation too. What was there before (weights, the batch) does not count, nor does its
    release, of which torch warns once; nor does scratch space that a library keeps to itself. Unlike the
    resident size of a process, the figure is the same each time.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    told = [e["args"] for e in events if e["name"] == "[memory]"]
    told.sort(key=lambda args: args["Ev Idx"])
    return max(accumulate((args["Bytes"] for args in told), initial=0))
