"""Strangers at the port: silent connections and bad greetings against a run of three parties, on loopback.

Prints whether the run ends with the simulator's results, and the most memory that each process had.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
from runs import PARTIES, RUN, below, status

from splitlearn.certificates import Identity, make_certificates
from splitlearn.federation.streams import METHOD, SERVICE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=2000, help="silent ones, at most 20000")
    parser.add_argument("--greetings", type=int, default=1000, help="bad ones, at most 20000")
    parser.add_argument("--seconds", type=float, default=300, help="after which the run is ended")
    parser.add_argument("more", nargs="*", help="of the run, e.g. trainer.max_epochs=2")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*RUN, *args.more, f"hydra.run.dir={folder}/alone"], check=True, capture_output=True)
        make_certificates([*PARTIES, "mallory"], folder / "certificates")
        flooded(folder, min(args.connections, 20000), min(args.greetings, 20000), args.seconds, args.more)
        alone, among = (json.loads((folder / run / "results.json").read_text()) for run in ("alone", "flooded"))
    print("equal to the simulator's:", alone["test"] == among["test"], among["test"])


def flooded(folder: Path, connections: int, greetings: int, seconds: float, more: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = ("engine=processes", "wire=grpc", f"wire.certificates={folder}/certificates")
    command = [*RUN, *more, *engine, f"engine.address=127.0.0.1:{port}", f"hydra.run.dir={folder}/flooded"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        peaks: dict[int, int] = {}
        watcher = threading.Thread(target=watch, args=(run, peaks), daemon=True)
        watcher.start()
        began = time.monotonic()
        silent = silence(port, connections, began + seconds)
        answers = greet(port, Identity.load(folder / "certificates/mallory", "mallory"), greetings)
        during = run.poll() is None
        while run.poll() is None and time.monotonic() < began + seconds:
            time.sleep(0.5)
        run.kill()
    print(
        f"{len(silent)} connections; greetings: {dict(answers)}; before its end: {during}; exit code {run.returncode}"
    )
    print("peak MB of each process:", sorted(peaks.values()))


def silence(port: int, number: int, until: float) -> list[socket.socket]:
    """Open as many connections as the host lets us, and say nothing."""
    made: list[socket.socket] = []
    while len(made) < number and time.monotonic() < until:
        try:
            made.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        except OSError:
            time.sleep(0.05)
    return made


def greet(port: int, mallory: Identity, number: int) -> Counter[str]:
    """Greet as alice0, with the certificate of somebody who has no part in the run; count the answers."""
    answers = Counter[str]()
    credentials = grpc.ssl_channel_credentials(mallory.ca, mallory.key, mallory.certificate)
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, [("grpc.ssl_target_name_override", "bob")]) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        for _ in range(number):
            answers[call(iter([b'{"party": "alice0"}']), timeout=5).code().name] += 1
    return answers


def watch(run: subprocess.Popen[bytes], peaks: dict[int, int]) -> None:
    """Keep the most MB of each process in `peaks`."""
    while run.poll() is None:
        for pid in below(run.pid):
            peaks[pid] = max(peaks.get(pid, 0), status(pid, "VmHWM"))
        time.sleep(0.5)


if __name__ == "__main__":
    main()
