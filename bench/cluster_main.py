"""The process of a cluster on this machine alone: `python -m bench.cluster_main CONFIG REPLICAS`.

Says "ready" on standard output when all replicas are, and ends when its standard input does.
"""

import argparse
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from bench.cluster_process import APPLICATION, ENGINE
from bench.options import Extra, positive

if TYPE_CHECKING:
    import ray
    from ray import serve
    from ray.serve import scripts
    from ray.serve.schema import ServeStatus
else:
    ray, serve, scripts = (Extra(name, "cluster") for name in ("ray", "ray.serve", "ray.serve.scripts"))

START_SECONDS, LOOK_SECONDS = 120.0, 0.2
LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by an address that others know
STORE_BYTES = 2**27  # of Ray's store of objects: what goes through it here is small


def main() -> int:
    """The process of a cluster; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster_main", description="A cluster's process.")
    parser.add_argument("config", help="YAML file, as `serve run` takes it")
    parser.add_argument("num_replicas", type=positive, help="of the engine, that are waited for")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ray.init(
        num_cpus=max(args.num_replicas, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        namespace="serve",
        _node_ip_address=LOOPBACK,
    )
    try:
        scripts.cli(["run", "--non-blocking", args.config], standalone_mode=False)
        deadline = time.monotonic() + START_SECONDS
        while not (is_ready := _is_ready(serve.status(), args.num_replicas)) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)  # Ray tells of a configuration's replicas in no other way
        print("ready" if is_ready else f"not ready: {serve.status()}".replace("\n", " "), flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def _is_ready(status: "ServeStatus", num_replicas: int) -> bool:
    """Whether so many replicas of the engine run, and the front."""
    application = status.applications.get(APPLICATION)
    if application is None or application.status != "RUNNING":
        return False
    states: dict[str, int] = application.deployments[ENGINE].replica_states
    return states.get("RUNNING", 0) == num_replicas


if __name__ == "__main__":
    raise SystemExit(main())
