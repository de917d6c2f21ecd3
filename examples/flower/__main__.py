"""The app on this machine, with real servers: ``python -m examples.flower`` or ``python -m examples.flower --deploy``.

It starts what README.md says, prints each command, and stops all of it in the end: a SuperLink, SuperNodes (or, without
``--deploy``, a SuperLink that simulates them), and ``flwr run``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RANKS = (4, 16, 8)
HOSTILE = 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.flower", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--deploy", action="store_true", help="a SuperNode for each node, instead of a simulation")
    add("--hostile", action="store_true", help=f"the node of partition {HOSTILE} sends NaN")
    add("--data", type=Path, default=ROOT / ".demo-data", help="folder with the two wheels (default: %(default)s)")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=8, help="optimizer steps of 32 questions, per node and round")
    add("--directory", default="", help="where rounds are kept, so that a run goes on where the last one stopped")
    add("--again", action="store_true", help="where the run fails, start it once more; with --directory it goes on")
    add("--out", default="", help="where the final adapter goes")
    return parser.parse_args(arguments)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path) -> dict[str, str]:
    """Of everything started here: the examples importable, nothing fetched or reported, Flower's files in ``home``."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    offline |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    own = str(Path(sys.executable).parent)
    return (
        os.environ
        | offline
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": os.pathsep.join([own, os.environ.get("PATH", "")]),
            "FLWR_HOME": str(home),
        }
    )


@contextmanager
def running(command: Sequence[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server in the background, with what it starts itself, until the block is left."""
    print(f"$ {shlex.join(command)} &  # log: {log}", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, timeout: float = 300.0) -> None:
    """Until somebody listens on a port. Raises ``RuntimeError`` where the process ends before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"nobody listens on port {port}; see {log}:\n{log.read_text()[-2000:]}")


def completed(env: dict[str, str]) -> bool:
    """Whether a run came to its end: ``flwr run`` has status 0 whatever becomes of it."""
    listed = subprocess.run(["flwr", "list", "here", "--format", "json"], env=env, capture_output=True, check=True)
    return any(run["status"] == "finished:completed" for run in json.loads(listed.stdout)["runs"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the app; returns 0 where the run came to its end."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is stopped then, too
    with tempfile.TemporaryDirectory(prefix="flexlora-flower-") as folder, ExitStack() as stack:
        home = Path(folder)
        env, port = environment(home), free_port()
        address = f"127.0.0.1:{port}"
        config = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
        if not options.deploy:
            config += f"options.num-supernodes = {len(RANKS)}\noptions.backend.client-resources.num-cpus = 1\n"
        (home / "config.toml").write_text(config)
        superlink = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        superlink += ["--disable-runtime-dependency-installation", *([] if options.deploy else ["--simulation"])]
        log = home / "superlink.log"
        wait_for(port, stack.enter_context(running(superlink, env, log)), log)
        for number, rank in enumerate(RANKS if options.deploy else ()):
            node = ["flower-supernode", "--insecure", "--superlink", address, "--port", str(free_port())]
            node += ["--node-config", f"partition-id={number} num-partitions={len(RANKS)} lora-rank={rank}"]
            stack.enter_context(running(node, env, home / f"supernode-{number}.log"))
        settings = [f'data="{options.data.resolve()}"', f"num-server-rounds={options.rounds}", f"steps={options.steps}"]
        settings += [f"hostile-partition={HOSTILE if options.hostile else -1}", f"nodes={len(RANKS)}"]
        for name, path in (("directory", options.directory), ("out", options.out)):
            settings.append(f'{name}="{path and Path(path).resolve()}"')
        run = ["flwr", "run", str(HERE), "here", "--stream", "--run-config", " ".join(settings)]
        for _ in range(2 if options.again else 1):
            print(f"$ {shlex.join(run)}", flush=True)
            subprocess.run(run, env=env, check=True)
            if completed(env):
                return 0
        print(f"the run failed; the logs of the servers:\n{last_lines(home)}", file=sys.stderr)
        return 1


def last_lines(home: Path) -> str:
    """The ends of all logs, which go with the folder that they are in."""
    return "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(home.glob("*.log")))


if __name__ == "__main__":
    sys.exit(main())
