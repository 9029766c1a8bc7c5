"""A fit over several hosts, on one Linux machine: network namespaces, each with an address and a host name of its own.

    sudo python tools/hosts.py [--hosts 2] [--parts same,cut,dask,slow] [--rows 20000] [--centers 2000]

Each host is a namespace that reaches the others through a bridge, by TCP alone; torchrun runs one rank in each, with
gloo. Needs root, and `ip` and `tc` of iproute2.

    same    the model of k hosts beside that of `--devices k` on one: bytes, or the largest difference of the weights
    cut     the link of the last host goes down in mid-epoch and comes back: both ends wait for each other in vain,
            are started again by torchrun, meet, and go on from the last checkpoint. The model must have the bytes of
            `same`
    dask    a fit on the first host whose rows a Dask worker on the last one reads, beside a fit that reads them itself:
            bytes of the model
    slow    links of a rate (tbf) or with a delay (netem, where the kernel has it): ms a step, and what docs/scaling.md
            says of the bytes: in a ring a link takes 2 (G - 1) / G of what is summed up
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from bench_ranks import make_store
from safetensors.torch import load_file

from ep3stream.planning.costs import Sizes, reduced_bytes_of_step
from ep3stream.run.event_log import read_lines

_PORT, _DASK_PORT, _WAIT_S = 29500, 8786, 600.0
RANK_TIMEOUT_MINUTES = 0.25
_FEATURES, _OUTPUTS, _BATCH = 32, 4, 256


def run(*command: object, check: bool = True) -> None:
    subprocess.run([*map(str, command)], check=check, stdout=subprocess.DEVNULL)


class Network:
    """k hosts at 10.99.0.1, .2, ...: namespaces whose device eth0 leads to a bridge in one of its own."""

    def __init__(self, n_hosts: int) -> None:
        self.n_hosts = n_hosts
        self.switch = f"ep3-{os.getpid()}-switch"

    def name(self, host: int) -> str:
        """Of the host's namespace."""
        return f"ep3-{os.getpid()}-{host}"

    def address(self, host: int) -> str:
        """Of the host's eth0."""
        return f"10.99.0.{host + 1}"

    def up(self) -> None:
        """Makes the namespaces and the links."""
        run("ip", "netns", "add", self.switch)
        run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for host in range(self.n_hosts):
            name = self.name(host)
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            ends = ["add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{host}"]
            run("ip", "link", *ends, "netns", self.switch)
            run("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", self.switch, "link", "set", f"port{host}", "master", "bridge", "up")

    def down(self) -> None:
        """Removes what there is of them, links and all."""
        for name in (self.switch, *map(self.name, range(self.n_hosts))):
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)

    def set_link(self, host: int, state: str) -> None:
        """The host's link is `up` or `down`; nobody at its ends is told that a connection is lost."""
        run("ip", "-n", self.switch, "link", "set", f"port{host}", state)

    def shape(self, *how: str) -> bool:
        """Every link with this queue of tc, such as `netem delay 1ms`; none for links as they are.

        False where the kernel has no such queue.
        """
        for host in range(self.n_hosts):
            queue = ["tc", "-n", self.name(host), "qdisc"]
            subprocess.run([*queue, "del", "dev", "eth0", "root"], stderr=subprocess.DEVNULL)
            added = how and subprocess.run(
                [*queue, "add", "dev", "eth0", "root", *how], stderr=subprocess.DEVNULL
            )
            if added and added.returncode:
                return False
        return True

    def start(self, host: int, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """torchrun on that host, in a namespace of host names of its own."""
        program = ["ip", "netns", "exec", self.name(host), "unshare", "--uts", "sh", "-c"]
        program += [f'hostname host{host}; exec "$@"', "sh", sys.executable, "-m", "torch.distributed.run"]
        program += ["--nnodes", str(self.n_hosts), "--node-rank", str(host), "--nproc-per-node", "1"]
        program += ["--master-addr", self.address(0), "--master-port", str(_PORT)]
        program += ["--local-addr", self.address(host), "--max-restarts", "9", *command]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            return subprocess.Popen(program, env=environment, stdout=out, stderr=out)

    def execute(self, host: int, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """A Python program on that host."""
        with log.open("wb") as out:
            program = ["ip", "netns", "exec", self.name(host), sys.executable, *arguments]
            return subprocess.Popen(
                program, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=out
            )

    def job(self, command: Sequence[str], logs: Path) -> list[subprocess.Popen[bytes]]:
        """The command on every host; logs: where host0.log, ... come to lie."""
        return [self.start(host, command, logs / f"host{host}.log") for host in range(self.n_hosts)]


@contextmanager
def network(n_hosts: int) -> Iterator[Network]:
    """The hosts, which are gone afterwards."""
    hosts = Network(n_hosts)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()


def fit_command(store: Path, run_path: Path, options: argparse.Namespace, *more: str) -> list[str]:
    settings = ["--kernel", "laplacian", "--centers", str(options.centers), "--epochs", str(options.epochs)]
    settings += ["--batch-size", str(_BATCH), "--validate", "none", "--checkpoint-minutes", "0.02"]
    config = store.parent / "config.toml"
    config.write_text(f"[run]\nrank_timeout_minutes = {RANK_TIMEOUT_MINUTES}\n")
    settings += ["--config", str(config)]
    return ["-m", "ep3stream", "fit", str(store), str(run_path), *settings, *more]


def finish(jobs: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    """Waits for all; RuntimeError with the end of its log where one fails."""
    deadline = time.monotonic() + _WAIT_S
    try:
        codes = [job.wait(max(1.0, deadline - time.monotonic())) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
    if any(codes):
        said = "\n".join(log.read_text()[-2000:] for log in sorted(logs.glob("host*.log")))
        raise RuntimeError(f"exit codes {codes}:\n{said}")


def steps_ms(run_path: Path) -> float:
    """The median of the time between records of steps, for one step."""
    steps = [line for line in read_lines(run_path / "metrics.jsonl") if line["kind"] == "step"]
    pairs = pairwise(steps)
    return 1e3 * statistics.median(
        (b["elapsed_s"] - a["elapsed_s"]) / (b["step"] - a["step"]) for a, b in pairs
    )


def model_digest(run_path: Path) -> str:
    return hashlib.sha256((run_path / "model" / "tensors.safetensors").read_bytes()).hexdigest()[:12]


def difference(one: Path, other: Path) -> float:
    """The largest difference of the weights, relative to the largest weight."""
    a, b = (load_file(path / "model" / "tensors.safetensors")["weights"] for path in (one, other))
    return float((a - b).abs().max() / b.abs().max())


def wait_for_checkpoint(run_path: Path, jobs: Sequence[subprocess.Popen[bytes]]) -> int:
    """The step of the first checkpoint, as soon as it is there."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline and all(job.poll() is None for job in jobs):
        if found := sorted((run_path / "checkpoints").glob("step-*")):
            return int(found[-1].name.removeprefix("step-"))
        time.sleep(0.05)
    raise RuntimeError(f"{run_path} came to no checkpoint")


def main() -> None:
    options = arguments()
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc"))):
        sys.exit("namespaces of networks need root, and ip and tc of the package iproute2")
    with tempfile.TemporaryDirectory(dir=options.directory) as folder, network(options.hosts) as hosts:
        place = Path(folder)
        store, whole = place / "rows.zarr", place / "several"
        make_store(store, options.rows, _FEATURES, _OUTPUTS)
        finish(hosts.job(fit_command(store, whole, options), place), place)
        plain = steps_ms(whole)
        print(f"{options.hosts} hosts: model {model_digest(whole)}, {plain:.2f} ms a step", flush=True)
        if "same" in options.parts:
            alone = place / "alone"
            command = fit_command(store, alone, options, "--devices", str(options.hosts))
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
            print(
                f"one host, {options.hosts} ranks: model {model_digest(alone)}, {steps_ms(alone):.2f} ms a step; "
                f"weights differ by {difference(whole, alone):.1g}",
                flush=True,
            )
        if "cut" in options.parts:
            cut(hosts, store, place, whole, options)
        if "dask" in options.parts:
            dask(hosts, store, place, options)
        if "slow" in options.parts:
            slow(hosts, store, place, options, plain)


def cut(hosts: Network, store: Path, place: Path, whole: Path, options: argparse.Namespace) -> None:
    run_path, last = place / "cut", hosts.n_hosts - 1
    jobs = hosts.job(fit_command(store, run_path, options), place)
    step = wait_for_checkpoint(run_path, jobs)
    hosts.set_link(last, "down")
    began = time.monotonic()
    time.sleep(2 * 60 * RANK_TIMEOUT_MINUTES)
    hosts.set_link(last, "up")
    finish(jobs, place)
    is_same = "the same bytes" if model_digest(run_path) == model_digest(whole) else "OTHER BYTES"
    resumed = [line for line in read_lines(run_path / "metrics.jsonl") if line.get("event") == "resume"]
    print(
        f"link of host{last} cut after step {step} for {2 * 60 * RANK_TIMEOUT_MINUTES:.0f} s: went on "
        f"{len(resumed)} times, ended {time.monotonic() - began:.0f} s after the cut, {is_same}",
        flush=True,
    )


def dask(hosts: Network, store: Path, place: Path, options: argparse.Namespace) -> None:
    scheduler = f"{hosts.address(0)}:{_DASK_PORT}"
    served = [
        "-m",
        "dask",
        "scheduler",
        "--host",
        hosts.address(0),
        "--port",
        str(_DASK_PORT),
        "--no-dashboard",
    ]
    reads = ["-m", "dask", "worker", scheduler, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
    others = [
        hosts.execute(0, *served, log=place / "scheduler.log"),
        hosts.execute(hosts.n_hosts - 1, *reads, log=place / "worker.log"),
    ]
    try:
        by_worker, by_itself = place / "by-worker", place / "by-itself"
        for path, more in ((by_worker, ("--dask", f"tcp://{scheduler}")), (by_itself, ())):
            log = place / "host0.log"
            finish([hosts.execute(0, *fit_command(store, path, options, *more), log=log)], place)
    finally:
        for process in others:
            process.terminate()
            process.wait(60)
    is_same = "the same bytes" if model_digest(by_worker) == model_digest(by_itself) else "OTHER BYTES"
    print(f"rows read by a Dask worker on host{hosts.n_hosts - 1}: {is_same}", flush=True)


def bytes_of_step(run_path: Path, n_hosts: int) -> int:
    """What the ranks sum up in a step that is not scored (docs/scaling.md)."""
    plan = json.loads((run_path / "run.json").read_text())["plan"]
    named = (
        "n_centers",
        "batch_size",
        "data_rank",
        "model_rank",
        "nystrom_samples",
        "n_landmarks",
        "group_size",
    )
    sizes = Sizes(
        n_rows=0,
        n_features=_FEATURES,
        n_outputs=_OUTPUTS,
        row_bytes=4 * (_FEATURES + _OUTPUTS),
        devices=n_hosts,
        **{name: plan[name] for name in named},
    )
    return reduced_bytes_of_step(sizes, plan["n_leading"])


def slow(hosts: Network, store: Path, place: Path, options: argparse.Namespace, plain: float) -> None:
    g, n_bytes = hosts.n_hosts, bytes_of_step(place / "several", hosts.n_hosts)
    for mbit in (1000, 100, 20):
        if not hosts.shape("tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "400ms"):
            print("this kernel has no tbf: no slow links", flush=True)
            break
        ms = steps_of(hosts, store, place / f"rate-{mbit}", place, options)
        alone = 1e3 * 2 * (g - 1) / g * n_bytes / (mbit * 125e3)
        print(
            f"{mbit} Mbit/s: {ms:.2f} ms a step, {ms - plain:+.2f}; {n_bytes / 1e3:.0f} kB a step are {alone:.2f} ms",
            flush=True,
        )
    for delay in (1, 5):
        if not hosts.shape("netem", "delay", f"{delay}ms"):
            print("this kernel has no netem: no delays", flush=True)
            break
        ms = steps_of(hosts, store, place / f"delay-{delay}", place, options)
        print(f"{delay} ms of delay: {ms:.2f} ms a step, {ms - plain:+.2f}", flush=True)
    hosts.shape()


def steps_of(hosts: Network, store: Path, run_path: Path, place: Path, options: argparse.Namespace) -> float:
    """Milliseconds a step of a fit over all hosts."""
    finish(hosts.job(fit_command(store, run_path, options), place), place)
    return steps_ms(run_path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", default=2, type=int)
    parser.add_argument("--parts", default=["same", "cut", "dask", "slow"], type=lambda text: text.split(","))
    parser.add_argument("--rows", default=20_000, type=int)
    parser.add_argument("--centers", default=2000, type=int)
    parser.add_argument("--epochs", default=4, type=int)
    parser.add_argument("--directory", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
