"""All families by name."""

import fnmatch

from tests.families import bounded, flight, linear, mechanisms, process, vehicles

MODULES = (linear, mechanisms, vehicles, flight, process, bounded)
FAMILIES = {family.name: family for module in MODULES for family in (f() for f in module.FAMILIES)}


def named(patterns):
    """Those whose name matches one of the patterns or contains it; all where there are none."""
    return [
        family
        for name, family in FAMILIES.items()
        if not patterns or any(fnmatch.fnmatch(name, f"*{p}*") for p in patterns)
    ]
