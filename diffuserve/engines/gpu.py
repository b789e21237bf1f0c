"""NVIDIA GPUs, as the driver's own library sees them: no package is needed to ask it."""

from __future__ import annotations

import ctypes

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def gpu_architectures() -> tuple[str, ...]:
    """The architecture of each GPU that this process may use, such as "sm90"; empty where there is none or no driver."""
    driver = _driver()
    count = ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_architecture(driver, number) for number in range(count.value))


def _driver() -> ctypes.CDLL | None:
    """The driver's library, ready to be called; None where there is none or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _architecture(driver: ctypes.CDLL, number: int) -> str:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return f"sm{major.value}{minor.value}"


def free_memory_bytes() -> int:
    """What is free of the first GPU's memory; 0 where that cannot be told."""
    driver = _driver()
    context, popped, free, total = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    # The context that libraries in this process use too.
    if driver is None or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) != 0:
        return 0
    try:
        if driver.cuCtxPushCurrent_v2(context) != 0:
            return 0
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(popped))
        return 0 if failed else free.value
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(0)
