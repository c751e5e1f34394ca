"""`verl-aqn selftest`: a ladder of checks for the first minutes with a new device.

`ladder` lists the rungs, `climb` runs them, `selftest_page` writes what they found. The rungs of codec and packed layer
need only torch (`--kernels-only`), so no file that they use may import another package.
"""
