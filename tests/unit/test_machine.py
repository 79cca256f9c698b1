"""What containers leave of a machine, read from machines laid out in a folder."""

import mmap
import os
from pathlib import Path

import pytest

from model import machine

GIB, MIB = 2**30, 2**20
UNLIMITED_V1 = 9223372036854771712


class Files:
    """A file system with a /proc and control groups."""

    def __init__(self, root: Path, available: int = 20 * GIB) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n")

    def write(self, path: str, content: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")

    def v2(self, own: str, mount_root: str = "/") -> None:
        """A host, or a container, with the unified hierarchy alone."""
        self.write("proc/self/cgroup", f"0::{own}")
        self.write(
            "proc/self/mountinfo",
            f"30 23 0:26 {mount_root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
        )

    def v1(self, own: str, mount_root: str = "/") -> None:
        """The hierarchies that matter of the older kind, beside an empty unified one."""
        self.write("proc/self/cgroup", f"5:memory:{own}\n4:cpu,cpuacct:{own}\n0::/")
        lines = [
            f"31 23 0:27 {mount_root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
            f"32 23 0:28 {mount_root} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct",
            "33 23 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        ]
        self.write("proc/self/mountinfo", "\n".join(lines))

    def group(self, path: str, **files: object) -> None:
        for name, content in files.items():
            self.write(f"sys/fs/cgroup{path}/{name.replace('__', '.')}", content)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return Files(tmp_path)


def free(files: Files) -> int:
    return machine.free_memory(files.root).free


def test_without_groups_the_machine_decides(files: Files) -> None:
    assert machine.free_memory(files.root) == (20 * GIB, False)
    assert machine.usable_cores(files.root) == 8


def test_a_container_sees_its_own_group_as_the_root(files: Files) -> None:
    files.v2("/")
    files.group("", memory__max=GIB, memory__current=300 * MIB, cpu__max="150000 100000")
    assert machine.free_memory(files.root) == (724 * MIB, True)
    assert machine.usable_cores(files.root) == 1


def test_groups_without_limits_limit_nothing(files: Files) -> None:
    files.v2("/user.slice/app")
    files.group("/user.slice", memory__max="max", memory__high="max", memory__current=GIB)
    files.group("/user.slice/app", memory__max="max", memory__current=GIB, cpu__max="max 100000")
    assert machine.free_memory(files.root) == (20 * GIB, False)
    assert machine.usable_cores(files.root) == 8


@pytest.mark.parametrize("tight", ["/pod", "/pod/box", "/pod/box/in"])
def test_the_tightest_group_on_the_way_up_counts(files: Files, tight: str) -> None:
    files.v2("/pod/box/in")
    for path in ("/pod", "/pod/box", "/pod/box/in"):
        limits = ("max", "max 100000") if path != tight else (2 * GIB, "300000 100000")
        files.group(path, memory__max=limits[0], memory__current=GIB, cpu__max=limits[1])
    assert free(files) == GIB
    assert machine.usable_cores(files.root) == 3


def test_a_group_that_is_slowed_down_counts_as_full(files: Files) -> None:
    files.v2("/")
    files.group("", memory__max=2 * GIB, memory__high=GIB, memory__current=0)
    assert free(files) == GIB


def test_cached_files_are_free_but_for_those_that_are_mapped_or_on_a_tmpfs(files: Files) -> None:
    files.v2("/")
    stat = f"anon {100 * MIB}\nfile {900 * MIB}\nfile_mapped {50 * MIB}\nshmem {300 * MIB}\n"
    cached = f"inactive_file {400 * MIB}\nactive_file {200 * MIB}"
    files.group("", memory__max=GIB, memory__current=1000 * MIB, memory__stat=stat + cached)
    assert free(files) == (24 + 550) * MIB


def test_the_machine_may_have_less_than_the_group(files: Files) -> None:
    files.v2("/")
    files.write("proc/meminfo", "MemAvailable: 1024 kB")
    files.group("", memory__max=GIB, memory__current=0)
    assert machine.free_memory(files.root) == (MIB, False)


def test_a_group_beyond_its_limit_has_nothing_left(files: Files) -> None:
    files.v2("/")
    files.group("", memory__max=GIB, memory__current=2 * GIB)
    assert free(files) == 0


@pytest.mark.parametrize(
    ("own", "mount_root"),
    [
        ("/docker/0a1b", "/docker/0a1b"),  # the host's names, and the container's own group mounted
        ("/../../elsewhere", "/"),  # outside of what the namespace shows
        ("/docker/0a1b/../0a1b", "/docker/0a1b"),
    ],
)
def test_names_of_the_host_inside_a_container(files: Files, own: str, mount_root: str) -> None:
    files.v2(own, mount_root)
    files.group("", memory__max=GIB, memory__current=0, cpu__max="200000 100000")
    assert (free(files), machine.usable_cores(files.root)) == (GIB, 2)


def test_version_1(files: Files) -> None:
    files.v1("/docker/0a1b", "/docker")
    stat = f"inactive_file 1\ntotal_inactive_file {100 * MIB}\ntotal_active_file 0\ntotal_mapped_file 0"
    files.group("/memory", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=5 * GIB)
    files.group(
        "/memory/0a1b",
        memory__limit_in_bytes=GIB,
        memory__usage_in_bytes=600 * MIB,
        memory__stat=stat,
    )
    files.group("/cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    files.group("/cpu/0a1b", cpu__cfs_quota_us=250000, cpu__cfs_period_us=100000)
    assert machine.free_memory(files.root) == (524 * MIB, True)
    assert machine.usable_cores(files.root) == 2


def test_version_1_without_limits(files: Files) -> None:
    files.v1("/")
    files.group("/memory", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=5 * GIB)
    files.group("/cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert machine.free_memory(files.root) == (20 * GIB, False)
    assert machine.usable_cores(files.root) == 8


@pytest.mark.parametrize("quota", ["5000 100000", "99999 100000"])
def test_a_part_of_a_core_is_one_thread(files: Files, quota: str) -> None:
    files.v2("/")
    files.group("", cpu__max=quota)
    assert machine.usable_cores(files.root) == 1


def test_affinity_below_the_quota(files: Files) -> None:
    files.v2("/")
    files.group("", cpu__max="1600000 100000")
    assert machine.usable_cores(files.root) == 8


@pytest.mark.parametrize("content", ["", "what", "12 34 56", "-1", "max", "1e9", "\xff"])
def test_a_file_that_says_nothing_known_limits_nothing(files: Files, content: str) -> None:
    files.v2("/")
    names = ("memory__max", "memory__current", "memory__stat", "cpu__max")
    files.group("", **dict.fromkeys(names, content))
    files.write("proc/self/mountinfo", (files.root / "proc/self/mountinfo").read_text() + content)
    assert machine.free_memory(files.root) == (20 * GIB, False)
    assert machine.usable_cores(files.root) == 8


def test_memory_of_this_process() -> None:
    """The memory is mapped anew: what the allocator has kept of earlier tests would not show."""
    before = machine.process_memory()
    assert before > MIB
    with mmap.mmap(-1, 2**25) as block:
        block.write(b"x" * len(block))
        assert 0.9 * len(block) < machine.process_memory() - before
    assert abs(machine.process_memory(os.getpid()) - machine.process_memory()) < 2**22


def test_a_process_that_is_gone() -> None:
    with pytest.raises(OSError, match="statm"):
        machine.process_memory(2**30)


def test_this_machine_can_be_read() -> None:
    assert 1 <= machine.usable_cores() <= len(os.sched_getaffinity(0))
    assert machine.free_memory().free > 0
