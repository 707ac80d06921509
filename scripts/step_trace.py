"""What a timeline of training steps on a GPU (rookery bench step --trace) says of them: whether a warm
step allocates memory or waits for the GPU, and how long the GPU has nothing to do.

    python3 scripts/step_trace.py FILE

prints it. The exit status is 1 if a step allocates or waits.
"""

import collections
import json
import sys

ALLOCATES = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaHostRegister", "cudaHostUnregister",
             "cuMemAlloc", "cuMemFree", "cuMemCreate", "cuMemRelease", "cuMemMap", "cuMemUnmap")
# A copy without Async waits, too. An event is not everything: waiting for one is how the numbers of
# the step before are read.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cuCtxSynchronize", "cuStreamSynchronize")


def is_waiting(name):
    return name.startswith(WAITS) or (name.startswith("cudaMemcpy") and "Async" not in name)


def busy_us(intervals):
    """Microseconds that are in at least one of the (begin, end)s, and the longest pause between."""
    busy, pause, end = 0, 0, None
    for begin, stop in sorted(intervals):
        if end is None or begin >= end:
            pause = max(pause, 0 if end is None else begin - end)
            busy += stop - begin
            end = stop
        elif stop > end:
            busy += stop - end
            end = stop
    return busy, pause


def findings_of(events):
    """Of the time from the first launch of a CUDA graph to the last: the trace's own beginning and end
    wait. None if there are not two launches."""
    calls = [event for event in events
             if event.get("cat") in ("cuda_runtime", "cuda_driver") and event.get("ph") == "X"]
    launches = [call["ts"] for call in calls if call["name"].startswith("cudaGraphLaunch")]
    if len(launches) < 2:
        return None
    begin, end = min(launches), max(launches)
    inside = collections.Counter(call["name"] for call in calls if begin <= call["ts"] <= end)
    on_gpu = [(event["ts"], event["ts"] + event["dur"]) for event in events
              if event.get("ph") == "X"
              and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy, pause = busy_us(on_gpu)
    first, last = (min(begin for begin, _ in on_gpu), max(end for _, end in on_gpu)) \
        if on_gpu else (0, 0)
    return {"launches": len(launches), "calls": dict(sorted(inside.items())),
            "allocates": sorted(name for name in inside if name.startswith(ALLOCATES)),
            "waits": sorted(name for name in inside if is_waiting(name)),
            "gpu_works": len(on_gpu), "gpu_us": last - first, "gpu_busy_us": busy,
            "longest_pause_us": pause}


def sentence_of(found):
    calls = ", ".join(f"{name} {count}" for name, count in found["calls"].items())
    share = 100 * found["gpu_busy_us"] / found["gpu_us"] if found["gpu_us"] else 0
    return (f"{found['launches']} launches of graphs, between them {calls}; {found['gpu_works']} kernels "
            f"and copies keep the GPU busy for {share:.1f} % of {found['gpu_us'] / 1000:.1f} ms, the "
            f"longest pause is {found['longest_pause_us']:.0f} us")


def events_of(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = findings_of(events_of(sys.argv[1]))
    if found is None:
        sys.exit(f"{sys.argv[1]}: fewer than two launches of CUDA graphs; make it with rookery bench "
                 "step --device cuda --trace")
    print(sentence_of(found))
    bad = found["allocates"] + found["waits"]
    sys.exit(f"a warm step calls {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
