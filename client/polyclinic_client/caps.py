"""What the processes of a site may use: threads by their environment, memory by a limit of the system, GPUs hidden.

The limit is RLIMIT_DATA, which counts what a process may write to that no file stands behind: allocations and stacks.
RLIMIT_AS would count address space, of which torch reserves far more than it uses, with CUDA above all. Each process
has the limit for itself; one beyond it fails to allocate and says so, and the node goes on. For a bound on all of them
together, and one that holds without their help, use the service manager's (MemoryMax= of systemd).
"""

import resource
import sys

from polyclinic_client.policy import Policy

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment(policy: Policy) -> dict[str, str]:
    """For processes that train; torch itself uses the study's number of threads, which the policy has compared."""
    limits = dict.fromkeys(THREADS, str(policy.threads)) if policy.threads else {}
    return limits if policy.gpu else {**limits, "CUDA_VISIBLE_DEVICES": ""}


def limit_memory(policy: Policy) -> None:
    """Limit this process and those that it starts from now on."""
    if policy.memory_gb and sys.platform == "linux":
        wanted, (_, hard) = int(policy.memory_gb * 1e9), resource.getrlimit(resource.RLIMIT_DATA)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def peak_mb() -> float:
    """The most memory that this process has had at once."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
