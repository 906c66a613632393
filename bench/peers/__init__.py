"""Other implementations, run as subprocesses in an environment of their own (``make peers``).

Arrays go there and come back as .npz files, so that neither side imports the other.
"""

import pathlib
import subprocess
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
INSTALLED = ROOT / ".venv-peers" / ".installed"
ABSENT = "absent (make peers)"
LEFT_OUT = "left out (--no-peers)"


def present() -> bool:
    """Whether ``make peers`` was run to its end."""
    return INSTALLED.exists()


def run(script: str, arrays: dict, timeout_s: float | None = None) -> dict[str, np.ndarray]:
    """Run ``bench/peers/<script> IN.npz OUT.npz`` with ``arrays`` in IN.npz; what is in OUT.npz."""
    with tempfile.TemporaryDirectory() as directory:
        given, made = (pathlib.Path(directory, name) for name in ("in.npz", "out.npz"))
        np.savez(given, **arrays)
        command = [PYTHON, pathlib.Path(__file__).parent / script, given, made]
        process = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        if process.returncode:
            raise RuntimeError(f"{script} failed:\n{process.stdout[-2000:]}{process.stderr}")
        with np.load(made) as results:
            return dict(results)


def attempt(script: str, arrays: dict, timeout_s: float | None = None) -> dict:
    """As ``run``; where the peer is absent, fails or takes too long, "missing" says why."""
    if not present():
        return dict(missing=ABSENT)
    try:
        return run(script, arrays, timeout_s)
    except subprocess.TimeoutExpired:
        return dict(missing=f"stopped after {timeout_s:.0f} s")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        return dict(missing=reason if reason.startswith("absent") else f"failed: {reason}")
