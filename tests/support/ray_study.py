"""A study on a Ray cluster of two nodes on this machine, with a worker killed in the middle of a run.

Arguments: study file, results folder. Prints `killed` when a worker was killed.
"""

import sys
import threading
import time

import psutil
import ray
from ray.cluster_utils import Cluster

from graphlora.study.plan import make_runs
from graphlora.study.ray_engine import run_on_ray
from graphlora.study.records import study_folder
from graphlora.study.spec import load_spec


def kill_one() -> None:
    """Kill the first worker that is at a run."""
    while True:
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::execute_run"):
                time.sleep(1)
                process.kill()
                sys.stdout.write("killed\n")
                return
        time.sleep(0.1)


def main() -> int:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        assert len(ray.nodes()) == 2
        spec = load_spec(sys.argv[1])
        threading.Thread(target=kill_one, daemon=True).start()
        return run_on_ray(make_runs(spec), study_folder(sys.argv[2], spec.study))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
