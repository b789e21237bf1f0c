"""For `locust -f loadtest/locustfile.py`; what it runs is in the package."""

from diffuserve_loadtest.sending.locustfile import WorkloadUser

__all__ = ["WorkloadUser"]
