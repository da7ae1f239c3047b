"""What has to be settled before torch is imported; utils.py, the first import of every script, imports this first.

A Python that is too old or lacks a package ends the script with one sentence. Threads and memory are set up for a
computer that does other things as well; whatever the user has exported stays as it is.
"""

import ctypes
import importlib.util
import os
import sys

PACKAGES = ("torch", "torchvision", "numpy", "pandas", "PIL", "scipy", "sklearn", "matplotlib", "tqdm")


def refuse_unfit_python():
    """Ends the script with exit status 2 when this Python cannot run it."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if sys.version_info < (3, 10):
        fault = f"is version {sys.version_info[0]}.{sys.version_info[1]}, and 3.10 or newer is needed"
    elif missing:
        fault = f"lacks {', '.join(missing)}"
    else:
        return
    requirements = os.path.join(os.path.dirname(os.path.abspath(__file__)), "requirements.txt")
    print(f"error: python3 is {sys.executable}, which {fault}; activate the virtual environment that has the packages, "
          f"or install them: python3 -m pip install -r '{requirements}'", file=sys.stderr)
    sys.exit(2)


def limit_spinning():
    """OpenMP's threads spin while they wait for each other: beside another busy process that costs tenfold time.

    After a short spin they sleep. The variables are those of GNU's OpenMP (iterations), and of Intel's and LLVM's
    (milliseconds).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        os.environ.setdefault("KMP_BLOCKTIME", "1")


def keep_memory():
    """glibc hands every large buffer back to the system and clears it anew at the next step; keeping it is faster."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


refuse_unfit_python()
limit_spinning()
keep_memory()
