"""Of a process that Ray's memory monitor killed, in one line: Ray's own text has forty, and the last is about Ray."""

from __future__ import annotations

import re

# As the raylet of Ray 2.60 writes them; its GB are 2^30 bytes.
_KILLED = re.compile(r"worker\(s\) were killed due to the node running low on memory")
_NODE = re.compile(r"Memory on the node .*? was ([\d.]+)GB used / ([\d.]+)GB limit")
_PROCESS = re.compile(r"Selected to kill: \(.*?actual memory used=([\d.]+)GB")
_REMEDIES = (
    "start fewer engines or attribution workers, take a smaller KV cache (on a CPU --engine-arg "
    "kv_cache_memory_bytes=...), or use a machine with more memory"
)


def killed_for_memory(text: str) -> str | None:
    """What happened, how much memory was used, and what to do; None where `text` is about something else."""
    if not _KILLED.search(text):
        return None
    facts = [f"its machine had {used} of {limit} GiB in use" for used, limit in _NODE.findall(text)[:1]]
    sizes = _PROCESS.findall(text)
    # Ray names all that it killed at once, and not which of them this error is about.
    if len(sizes) == 1:
        facts.append(f"the process itself {sizes[0]} GiB")
    said = f" ({', '.join(facts)})" if facts else ""
    return f"Ray killed the process because memory ran low{said}; {_REMEDIES}"
