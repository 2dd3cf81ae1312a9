"""A folder of jobs that any number of processes work off, each job once. Needs no torch.

A job is a file; its state is the folder that it lies in, and every change of state is one rename::

    pending/NAME.qx  ->  claimed/WORKER/NAME.qx  ->  done/NAME.qx
                    <-                           ->  failed/NAME.qx, with NAME.txt that says why

What a dead worker held goes back to ``pending``: on its own machine when the system has let go of its lock, elsewhere
when its heartbeat has stood still for as long as the lease. Jobs that failed before, or that a worker died at, are
claimed after all others, so that none keeps the rest from being done.
"""

from .folder import SUFFIX, JobFolder
from .ledger import NAME, Ledger
from .worker import ATTEMPTS, LEASE_SECONDS, Claim, Worker

__all__ = ["ATTEMPTS", "LEASE_SECONDS", "NAME", "SUFFIX", "Claim", "JobFolder", "Ledger", "Worker"]
