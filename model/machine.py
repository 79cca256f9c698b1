"""What this process may use of its machine: cores, memory, and how much memory it takes already.

The only module that reads /proc and the control groups that containers are made of (cgroup v2, and v1 where
it is still mounted). Pure Python, without torch. Invariant: a limit of any group on the way up to the root
counts, since the kernel enforces all of them; a file that is missing or says nothing known limits nothing.
Every function takes the root of the file system, so that a test can lay out a machine of its own.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
PROJECT = Path(__file__).resolve().parents[1]  # the folder of our packages


class Memory(NamedTuple):
    """Bytes that may still be taken, and whether a limit of a container sets them rather than the machine."""

    free: int
    is_limited: bool


class _Mount(NamedTuple):
    """A mounted hierarchy of control groups: its folder, the group shown there, and the controllers (v1)."""

    folder: Path
    group: str
    controllers: frozenset[str]  # empty: cgroup v2


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment and `variables`, with our packages importable wherever it was started."""
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def cache_folder() -> Path:
    """Where this program keeps what it would otherwise work out again; the folder may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speed-serve"


def usable_cores(root: Path = ROOT) -> int:
    """Cores that the process can keep busy: its affinity, or less where a container has a quota of time.

    A quota of 1.5 cores counts as one: a thread beyond the quota makes all wait when it is spent.
    """
    quotas = [*_v2_quotas(root), *_v1_quotas(root)]
    return max(1, min([_affinity(), *map(math.floor, quotas)]))


def free_memory(root: Path = ROOT) -> Memory:
    """Memory that can be had without swapping or being killed.

    The least of what the kernel calls available and of what every group up to the root has left. Cached
    files count as free unless they are mapped: the kernel drops them when a group reaches its limit.
    """
    available = _available(root)
    left = [*_v2_memory(root), *_v1_memory(root)]
    free = max(0, min([available, *left]))
    return Memory(free, bool(left) and min(left) < available)


def process_memory(pid: int | None = None, root: Path = ROOT) -> int:
    """Bytes of memory that a process holds now (by default this one); raises OSError if there is none."""
    text = (root / "proc" / ("self" if pid is None else str(pid)) / "statm").read_text(encoding="ascii")
    return int(text.split()[1]) * os.sysconf("SC_PAGESIZE")


def process_seconds(pid: int, root: Path = ROOT) -> float:
    """Seconds that a process has had of all cores, user and system; raises OSError if there is none."""
    text = (root / "proc" / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()  # the name before may hold anything; see proc(5)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processor(root: Path = ROOT) -> str:
    """The name of the processor as the kernel gives it; empty where it gives none."""
    return _table(root / "proc" / "cpuinfo", ":").get("model name", "")


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available(root: Path) -> int:
    """MemAvailable in bytes; where the kernel gives none, half of the physical memory."""
    words = _table(root / "proc" / "meminfo", ":").get("MemAvailable", "").split()
    if words and words[0].isdecimal():
        return int(words[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2


# ---- what the groups say ---------------------------------------------------------------------------


def _v2_quotas(root: Path) -> Iterator[float]:
    for folder in _groups(root, None):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and all(map(str.isdecimal, words)) and int(words[1]):
            yield int(words[0]) / int(words[1])


def _v1_quotas(root: Path) -> Iterator[float]:
    for folder in _groups(root, "cpu"):
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and period:
            yield quota / period


def _v2_memory(root: Path) -> Iterator[int]:
    """What each group has left; beyond `memory.high` a group is slowed down until it is of no use."""
    for folder in _groups(root, None):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        used = _number(folder / "memory.current")
        known = [limit for limit in limits if limit is not None]
        if known and used is not None:
            yield min(known) - used + _reclaimable(folder / "memory.stat", "")


def _v1_memory(root: Path) -> Iterator[int]:
    for folder in _groups(root, "memory"):
        limit, used = (_number(folder / f"memory.{name}_in_bytes") for name in ("limit", "usage"))
        if limit is not None and used is not None:
            yield limit - used + _reclaimable(folder / "memory.stat", "total_")


def _reclaimable(stat: Path, prefix: str) -> int:
    """Bytes of cached files that nobody has mapped. Files on a tmpfs are no such: they can't be dropped."""
    counts = _table(stat, " ")
    cached, mapped = (
        sum(int(counts.get(prefix + name, "0")) for name in names)
        for names in (("active_file", "inactive_file"), ("file_mapped" if not prefix else "mapped_file",))
    )
    return max(0, cached - mapped)


# ---- where the groups are --------------------------------------------------------------------------


def _groups(root: Path, controller: str | None) -> Iterator[Path]:
    """Folders of this process's group and of all above it that can be seen; None is cgroup v2.

    A container sees its own group, or one above it, mounted as if it were the root.
    """
    own = _own_group(root, controller)
    for mount in _mounts(root):
        if own is None or (controller not in mount.controllers if controller else mount.controllers):
            continue
        inside = os.path.relpath(own, mount.group)
        parts = [] if inside == "." or inside.startswith("..") else inside.split("/")
        for depth in range(len(parts), -1, -1):
            yield mount.folder.joinpath(*parts[:depth])


def _own_group(root: Path, controller: str | None) -> str | None:
    """The path of this process's group in a hierarchy; None if there is no such hierarchy."""
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") if controller else number == "0":
            return path
    return None


def _mounts(root: Path) -> Iterator[_Mount]:
    """The hierarchies that are mounted, by /proc/self/mountinfo (see proc(5) for its fields)."""
    for line in _text(root / "proc" / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if kind not in ("cgroup", "cgroup2") or len(fields) < 5:
            continue
        controllers = rest[-1].split(",") if kind == "cgroup" else []
        yield _Mount(root / fields[4].lstrip("/"), fields[3], frozenset(controllers))


def _number(path: Path) -> int | None:
    """The whole number in a file, at least 0; None for any other content ("max", -1) or none."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path, separator: str) -> Mapping[str, str]:
    """Lines of name, separator and value; of a name that comes again its first value."""
    table: dict[str, str] = {}
    for line in _text(path).splitlines():
        name, _, value = line.partition(separator)
        table.setdefault(name.strip(), value.strip())
    return table


def _text(path: Path) -> str:
    """The content of a file; empty if it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
