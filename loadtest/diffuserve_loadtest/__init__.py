"""Load tests of diffuserve and of what it is compared with; its benchmarks are in `diffuserve_loadtest.bench`."""
