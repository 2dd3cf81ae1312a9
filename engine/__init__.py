"""The runtime: request, job, stream of events."""
