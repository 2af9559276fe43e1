"""What recordings may take: all of them count against one number, and the least recently used go first."""

from __future__ import annotations

import itertools
import threading
from operator import attrgetter

from .driver import Graph

ticks = itertools.count(1)  # what use is counted in


class Entry:
    """What a stage keeps for one key. As it is, it stands for "this cannot be replayed"."""

    nbytes = 1024  # about, with its key
    graph: Graph | None = None  # with ``nbytes`` of its own
    last_used = replays = 0

    def __init__(self) -> None:
        self.own: dict[tuple[int, ...], Graph] = {}  # graphs for single sets of addresses

    def replay(self, bases: list[int]) -> tuple | None:
        """The results of the stage on inputs at these addresses, or None where it runs as Python."""
        return None


class PlanCache:
    """The recordings of all layers, in the manner of ``torch.backends.cuda.cufft_plan_cache``.

    A recording takes some 20 KiB of host memory for each stage (forward, backward) and each kind of input, and once it
    is in use a CUDA graph, whose memory on the device does not come from PyTorch's allocator. Layers of one size share
    them; every number of tokens has its own. Where tokens are few each of these layers gets a graph of its own, as long
    as all together take no more than half of ``max_bytes``. Where all together would take more than ``max_bytes``, the
    graphs that were not used for longest are destroyed (their stages are launched kernel by kernel then), and after the
    last graph the recordings that were not used for longest (they are recorded again when they are needed).
    """

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.RLock()  # a finalizer may get here from within
        self._entries: dict[Entry, tuple[dict, tuple]] = {}  # and where it is kept: a stage's dictionary, the key
        self._bytes, self._max_bytes = 0, max_bytes

    @property
    def bytes(self) -> int:
        """What all recordings take: host memory, and an estimate of what the driver takes on devices for graphs."""
        return self._bytes

    @property
    def max_bytes(self) -> int:
        """The most that ``bytes`` may be; can be set, at any time. 256 MiB unless it is."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"max_bytes must be an int, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"max_bytes must not be negative, got {value}")
        with self._lock:
            self._max_bytes = value
            self._trim()

    @property
    def size(self) -> int:
        """How many recordings there are."""
        return len(self._entries)

    def clear(self) -> None:
        """Forget all recordings and destroy their graphs. Stages are recorded again as they are met."""
        with self._lock:
            for entry in list(self._entries):
                self._remove(entry)

    def add(self, home: dict, key: tuple, entry: Entry) -> None:
        """Keep an entry as ``home[key]``, in place of another one."""
        with self._lock:
            old = home.get(key)
            if old is not None:
                self._remove(old)
            entry.last_used = next(ticks)
            home[key] = entry
            self._entries[entry] = home, key
            self._bytes += entry.nbytes
            self._trim()

    def has_room(self, nbytes: int) -> bool:
        """Whether what can be done without may take so much: half of what there may be is left to what cannot."""
        return self._bytes + nbytes <= self._max_bytes // 2

    def add_graph(self, entry: Entry, graph: Graph, bases: tuple[int, ...] | None = None) -> None:
        """Hand an entry its graph, or one for a set of addresses, which counts from here on."""
        with self._lock:
            if bases is None:
                entry.graph = graph
            else:
                entry.own[bases] = graph
            self._count(entry, graph.nbytes)
            self._trim()

    def drop_graph(self, entry: Entry) -> None:
        """Take an entry's graphs away, if it has any; its next one is made after as many uses as the first."""
        with self._lock:
            graph, entry.graph, entry.replays = entry.graph, None, 0
            freed = sum(own.nbytes for own in entry.own.values()) + (0 if graph is None else graph.nbytes)
            entry.own = {}
            if freed:
                self._count(entry, -freed)

    def _count(self, entry: Entry, change: int) -> None:
        entry.nbytes += change
        if entry in self._entries:
            self._bytes += change

    def _remove(self, entry: Entry) -> None:
        home, key = self._entries.pop(entry)
        self._bytes -= entry.nbytes
        home.pop(key, None)

    def _trim(self) -> None:
        if self._bytes <= self._max_bytes:
            return
        enough = self._max_bytes - self._max_bytes // 8  # some room, so that not each new one has to look for it
        by_use = sorted(self._entries, key=attrgetter("last_used"))
        for entry in by_use:
            if self._bytes > enough and (entry.graph is not None or entry.own):
                self.drop_graph(entry)
        for entry in by_use:
            if self._bytes > enough:
                self._remove(entry)


plan_cache = PlanCache(256 << 20)
