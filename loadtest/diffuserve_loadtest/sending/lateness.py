"""Whether the generator sent what it was to send, when it was to."""

from __future__ import annotations

from diffuserve_loadtest.sending.records import LATE_S, Recording, counted_of

LATE_SHARE = 0.01


def shortfall(recording: Recording) -> str:
    """In words, what the generator did not manage; empty if it sent everything in time, but for a hundredth."""
    counted = counted_of(recording)
    late = sum(record.late for record in counted)
    if recording.unsent:
        return (
            f"{recording.unsent} requests were due and not sent, since {recording.workload.max_in_flight} were in flight "
            "(max_in_flight)"
        )
    if late > LATE_SHARE * len(counted):
        return (
            f"{late} of {len(counted)} requests were sent more than {LATE_S * 1000:.0f} ms after they were due. Use more "
            "processes (--workers, or --processes of Locust), or a machine with nothing else on it"
        )
    return ""
