"""Tasks a second of /bin/true on HyperQueue's own local cluster: server and worker in this process.

usage: local_cluster.py TASKS CORES. The last line is one number. Needs the package `hyperqueue`. Outputs are not kept, nothing is
journalled, nothing is fenced.
"""

import sys
import time

from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig


def seconds(client, tasks):
    job = Job()
    for _ in range(tasks):
        job.program(["/bin/true"], stdout=None, stderr=None)
    begun = time.monotonic()
    client.wait_for_jobs([client.submit(job)])
    return time.monotonic() - begun


def main():
    tasks, cores = int(sys.argv[1]), int(sys.argv[2])
    with LocalCluster() as cluster:
        cluster.start_worker(WorkerConfig(cores=cores))
        client = cluster.client()
        seconds(client, 100)
        rate = tasks / seconds(client, tasks)
    print(rate)


main()
