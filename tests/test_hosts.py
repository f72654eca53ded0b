"""Bob and Alice on two hosts, as far as one machine can: a network namespace each, joined by a cable."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from uuid import uuid4

import pytest
from commands import Command
from federated import results_of

from splitlearn.certificates import make_certificates
from splitlearn.train import train

BOB, ALICE = "10.77.0.1", "10.77.0.2"


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """The namespaces of bob and alice0; skips where the machine does not let one make any."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    tag = uuid4().hex[:6]
    names = {"bob": f"bob{tag}", "alice0": f"alice{tag}"}
    ends = {"bob": (f"b{tag}", BOB), "alice0": (f"a{tag}", ALICE)}
    try:
        for name in names.values():
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("this machine allows no network namespaces")
        (near, _), (far, _) = ends.values()
        cable = ["ip", "link", "add", near, "netns", names["bob"], "type", "veth"]
        subprocess.run([*cable, "peer", "name", far, "netns", names["alice0"]], check=True)
        for party, (end, address) in ends.items():
            for command in (["addr", "add", f"{address}/24", "dev", end], ["link", "set", end, "up"]):
                subprocess.run(["ip", "-n", names[party], *command], check=True)
            subprocess.run(["ip", "-n", names[party], "link", "set", "lo", "up"], check=True)
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["gloo", "grpc"])
def test_two_hosts_equal_the_simulator(wire, hosts, configure, tmp_path):
    make_certificates(list(hosts), tmp_path / "certificates")
    asked = ["+experiment=digits_2party", "trainer.max_epochs=2", "trainer.accelerator=cpu"]
    quiet = ["trainer.enable_progress_bar=false", "engine=processes", f"wire={wire}", f"engine.address={BOB}:29400"]
    running = []
    for party, host in hosts.items():
        own = [f"engine.party={party}", f"hydra.run.dir={tmp_path}/{party}", "engine.join_timeout=100"]
        own += [f"wire.certificates={tmp_path}/certificates/{party}"] if wire == "grpc" else []
        running.append(Command(*asked, *quiet, *own, cwd=tmp_path, out=tmp_path / f"{party}.log", host=host))
    assert [process.wait(120) for process in running] == [0, 0]
    train(configure(*asked, f"output_dir={tmp_path}/whole"))
    for party in hosts:
        assert results_of(tmp_path / party) == results_of(tmp_path / "whole")
