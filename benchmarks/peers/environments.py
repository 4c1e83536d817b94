"""Create a virtual environment for each peer, once.

`torch` is pinned as in the whole project, because a range would install gigabytes of CUDA on a machine that has the CPU
build. TRL accepts our constraints, so it runs with the same versions as ours. LLaMA-Factory needs older versions, which
its requirements file pins. It is installed without its dependencies, because preprocessing text needs neither its web
interface (gradio, fastapi) nor torchaudio, torchvision and av, whose builds conflict with the pinned torch.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_CONSTRAINTS = _HERE.parent.parent / "constraints.txt"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The environment of a peer."""

    name: str
    """Name of its folder."""

    installs: tuple[tuple[str, ...], ...]
    """Arguments of each `pip install`, in order."""

    variants: tuple[dict[str, object], ...] = ({},)
    """Variants of the same job; each is measured."""


PEERS = {
    "trl": Peer(
        name="trl",
        installs=(("--constraint", str(_CONSTRAINTS), "trl==1.16.0", "torch"),),
        variants=({"loss": "completion"}, {"loss": "assistant"}),
    ),
    "llamafactory": Peer(
        name="llamafactory",
        installs=(("--requirement", str(_HERE / "llamafactory.txt")), ("--no-deps", "llamafactory==0.9.5")),
    ),
}


def environment(peer: Peer, folder: Path) -> Path:
    """Return the Python of a peer's environment; create it if it is missing or has different pins.

    Args:
        peer: The peer.
        folder: Folder of all environments, which git ignores.

    Raises:
        SystemExit: If this Python is too old for the peers.
        subprocess.CalledProcessError: If pip fails.
    """
    if sys.version_info < (3, 11):
        raise SystemExit(
            "trl and llamafactory need Python 3.11 or newer; leave them out: --only tokenizers ours packing"
        )
    home = (folder / peer.name).resolve()
    python, stamp, pins = home / "bin" / "python", home / ".installed", _pins(peer)
    if not stamp.exists() or stamp.read_text() != pins:
        print(f"creating the environment of {peer.name} in {home} …", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        venv.create(home, clear=True, with_pip=True)
        for arguments in peer.installs:
            subprocess.run([python, "-m", "pip", "install", "-qq", *arguments], check=True)
        stamp.write_text(pins)  # last, so that an interrupted installation is repeated
    return python


def _pins(peer: Peer) -> str:
    words = [word for arguments in peer.installs for word in arguments]
    files = [Path(word) for word in words if word.endswith(".txt")]
    return "\n".join([*(word for word in words if not word.endswith(".txt")), *(file.read_text() for file in files)])
