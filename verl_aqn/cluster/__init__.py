"""Several machines: a Ray cluster, its token, and jobs that run recipes on it."""
