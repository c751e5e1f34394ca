"""Several machines: a Ray cluster, its token, and runs that are submitted to it."""
