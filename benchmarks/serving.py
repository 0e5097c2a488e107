"""How fast the forecast endpoint is beside the least a server can be, and beside `mlflow models serve`.

    python -m benchmarks.serving [--requests N] [--mlflow] [--soak N]

Each server runs in a process of its own with one worker on loopback. Latency: one connection, the next request goes
when the answer is there. Throughput: eight connections, each with a request under way. Servers take turns, several
rounds, so that a busy machine is busy for all. CPU time of the server's processes per request tells what throughput
one core can give, and other programs on the machine change it least.

    echo      FastAPI + onnxruntime: the model's own tensors in, its tensors out; no key, no rules, no reasons
    islet     the whole endpoint: key, rate limit, audit log, 48 timestamped readings, rules, 12 points, probabilities
    mlflow    `mlflow models serve` of the same model folder (python_function flavour), tensors in, tensors out

--soak sends that many requests to the endpoint, switching the model every tenth of them, and prints its errors, the
switches that the answers show, and how its memory grew.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

HISTORY_MINUTES, HIDDEN_SIZE = 180, 32
READINGS = 48
ROUNDS = 5
CONNECTIONS = 8
BUSY = 10_000_000  # requests per minute: a limit that is checked and never met

Times = dict[str, list[float]]

ECHO = """
import sys, numpy as np, onnxruntime, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1; options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
class Window(BaseModel):
    x: list[list[list[float]]]
    last: list[float]
app = FastAPI()
@app.post("/predict")
async def predict(window: Window):
    x, last = np.array(window.x, np.float32), np.array(window.last, np.float32)
    forecast, quantiles = session.run(["forecast", "quantiles"], {"x": x, "last": last})
    return {"forecast": forecast.tolist(), "quantiles": quantiles.tolist()}
uvicorn.run(app, port=int(sys.argv[2]), access_log=False, log_level="warning")
"""

ISLET = """
import sys
from pathlib import Path
from hospital_node.endpoint import serve
from hospital_node.rate_limit import RateLimit
limit = RateLimit(per_minute=int(sys.argv[4]), burst=int(sys.argv[4]))
serve(Path(sys.argv[3]), Path(sys.argv[1]), port=int(sys.argv[2]), limit=limit)
"""


class Connection:
    """One keep-alive HTTP/1.1 connection that sends the same bytes again and again."""

    def __init__(self, port: int, path: str, headers: dict[str, str], body: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
        lines += [f"{k}: {v}" for k, v in headers.items()] + [f"Content-Length: {len(body)}", "", ""]
        self._request = "\r\n".join(lines).encode() + body

    def ask(self) -> tuple[int, bytes]:
        """Send the request and return status and body."""
        self.send()
        return self.answer()

    def send(self) -> None:
        """Send the request."""
        self._socket.sendall(self._request)

    def answer(self) -> tuple[int, bytes]:
        """Wait for the answer of the request that was sent."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, rest = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(rest) < length:
            rest += self._more()
        return int(head.split(b" ", 2)[1]), rest

    def _more(self) -> bytes:
        if data := self._socket.recv(65536):
            return data
        raise ConnectionError("the server hung up")


def main() -> None:
    """Run the comparison and print its ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--requests", type=int, default=400, help="requests of one round to one server")
    parser.add_argument("--mlflow", action="store_true", help="also start `mlflow models serve` (half a minute)")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="then send N requests to the endpoint")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        root = Path(place)
        home, model, secret = _prepare(root)
        tensors = _tensors()
        ports = {name: _free_port() for name in ("echo", "islet", "mlflow")}
        echo = [sys.executable, "-c", ECHO, str(model), str(ports["echo"])]
        islet = [sys.executable, "-c", ISLET, str(model), str(ports["islet"]), str(home), str(BUSY)]
        sessions = {"echo": stack.enter_context(_server(echo, ports["echo"])).pid}
        sessions["islet"] = stack.enter_context(_server(islet, ports["islet"])).pid
        headers = {"Authorization": f"Bearer {secret}"}
        connections = {
            "echo": _connections(ports["echo"], "/predict", {}, json.dumps(tensors).encode()),
            "islet": _connections(ports["islet"], "/v1/forecast", headers, _readings()),
        }
        if asked.mlflow:
            command = _mlflow_command(root, model, ports["mlflow"])
            sessions["mlflow"] = stack.enter_context(_server(command, ports["mlflow"])).pid
            body = json.dumps({"inputs": tensors}).encode()
            connections["mlflow"] = _connections(ports["mlflow"], "/invocations", {}, body)
        _report(*_compare(connections, sessions, asked.requests))
        if asked.soak:
            _soak(ports["islet"], headers, sessions["islet"], asked.soak, model)


def _prepare(root: Path) -> tuple[Path, Path, str]:
    """Make a node, two models of realistic size, a link to the first, and a key."""
    from data_schemas.canonical import bytes_hash
    from data_schemas.plan import ModelSpec
    from hospital_node.api_keys import create_key
    from hospital_node.folder import NodeFolder
    from hospital_node.settings import NodeSettings
    from pipeline.export import write_model
    from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
    from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn

    home = root / "node"
    NodeFolder.create(
        home,
        NodeSettings(name="bench", federation="bench", declared_training_patients=10, declared_heldout_patients=5),
    )
    spec = ModelSpec(history_minutes=HISTORY_MINUTES, hidden_size=HIDDEN_SIZE)
    for number in range(2):
        weights = flatten(Forecaster(ForecasterSpec(hidden_size=HIDDEN_SIZE), seed=number))
        card = ModelCard(
            version=str(number),
            model_hash=bytes_hash(weights.tobytes()),
            spec=spec,
            trained_on=(TrainedOn(node="bench", declared_training_patients=10, declared_heldout_patients=5),),
            privacy=CardPrivacy(unit="patient", epsilon=8.0, delta=1e-5, rounds=1, noise_source="seeded"),
        )
        write_model(root / f"model-{number}", weights, spec, card)
    return home, _serve_model(root / "model", 0), create_key(home, "all", time.time())[1]


def _serve_model(link: Path, number: int) -> Path:
    """Move a new link over the one that the endpoint follows, as an operator does."""
    fresh = link.with_name("new")
    fresh.symlink_to(f"model-{number}")
    return fresh.replace(link)


def _times() -> list[datetime]:
    newest = datetime.now(UTC) - timedelta(minutes=1)
    return [newest - timedelta(minutes=5 * back) for back in range(READINGS - 1, -1, -1)]


def _readings() -> bytes:
    rows = [{"at": at.isoformat(timespec="seconds"), "glucose": 110 + n % 17} for n, at in enumerate(_times())]
    return json.dumps({"units": "mg/dL", "readings": rows}).encode()


def _tensors() -> dict[str, object]:
    import numpy as np

    from pipeline.windows import WindowSpec, history_features

    times = np.array([int(at.timestamp()) for at in _times()])
    glucose = np.array([110 + n % 17 for n in range(READINGS)], np.float32)
    x, last = history_features(times, glucose, WindowSpec(history_minutes=HISTORY_MINUTES))
    return {"x": np.round(x.astype(float), 5).tolist(), "last": last.tolist()}


def _mlflow_command(root: Path, model: Path, port: int) -> list[str]:
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from pipeline.windows import FEATURES, WindowSpec

    steps = WindowSpec(history_minutes=HISTORY_MINUTES).steps
    kind = np.dtype(np.float32)
    inputs = Schema([TensorSpec(kind, (-1, steps, len(FEATURES)), "x"), TensorSpec(kind, (-1,), "last")])
    path = root / "mlflow-model"
    mlflow.pyfunc.save_model(
        path,
        loader_module="pipeline.export",
        data_path=str(model),
        signature=ModelSignature(inputs=inputs),
        pip_requirements=[],
    )
    program = [str(Path(sys.executable).parent / "mlflow"), "models", "serve", "--env-manager", "local"]
    return [*program, "-m", str(path), "-p", str(port), "--workers", "1"]


@contextmanager
def _server(command: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    quiet = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(Path.cwd())}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | quiet | {"PATH": path}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            _wait(port, process)
            yield process
        finally:
            os.killpg(process.pid, 15)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit("a server ended before it answered")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("a server did not start within two minutes")


def _connections(port: int, path: str, headers: dict[str, str], body: bytes) -> list[Connection]:
    return [Connection(port, path, headers, body) for _ in range(CONNECTIONS)]


def _compare(
    connections: dict[str, list[Connection]], sessions: dict[str, int], requests: int
) -> tuple[Times, Times, Times]:
    """Milliseconds by server, after a warm-up: every lone request; per request with eight under way; of CPU."""
    for name, several in connections.items():
        for connection in several * 10:
            status, body = connection.ask()
            if status != 200:
                raise SystemExit(f"{name} answered {status}: {body[:300]!r}")
    alone: Times = {name: [] for name in connections}
    together: Times = {name: [] for name in connections}
    cpu: Times = {name: [] for name in connections}
    for _ in range(ROUNDS):
        for name, several in connections.items():
            for _ in range(requests):
                started = time.perf_counter()
                several[0].ask()
                alone[name].append((time.perf_counter() - started) * 1e3)
        for name, several in connections.items():
            started, spent = time.perf_counter(), _cpu_seconds(sessions[name])
            _ask_together(several, requests)
            together[name].append((time.perf_counter() - started) * 1e3 / requests)
            cpu[name].append((_cpu_seconds(sessions[name]) - spent) * 1e3 / requests)
    return alone, together, cpu


def _cpu_seconds(session: int) -> float:
    """User and system time of every process of a session (proc(5), stat fields 6, 14 and 15)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _ask_together(several: list[Connection], requests: int) -> None:
    """Keep one request under way on each connection until `requests` were answered."""
    for connection in several:
        connection.send()
    for done in range(requests):
        connection = several[done % len(several)]
        connection.answer()
        if done < requests - len(several):
            connection.send()


def _report(alone: Times, together: Times, cpu: Times) -> None:
    heads = ("p50 ms", "p99 ms", "req/s", "cpu ms", "p50 / echo", "rps / mlflow", "mlflow cpu / cpu")
    print(f"{'server':<8}" + "".join(f"{head:>18}" if len(head) > 12 else f"{head:>13}" for head in heads))
    p50 = {name: statistics.median(values) for name, values in alone.items()}
    rate = {name: 1e3 / statistics.median(values) for name, values in together.items()}
    work = {name: statistics.median(values) for name, values in cpu.items()}
    for name, values in alone.items():
        p99 = statistics.quantiles(values, n=100)[98]
        numbers = [p50[name], p99, rate[name], work[name], p50[name] / p50["echo"]]
        line = "".join(f"{number:>13.3f}" for number in numbers)
        if "mlflow" in rate:
            line += f"{rate[name] / rate['mlflow']:>13.2f}{work['mlflow'] / work[name]:>18.2f}"
        print(f"{name:<8}{line}")


def _soak(port: int, headers: dict[str, str], pid: int, requests: int, link: Path) -> None:
    """Send many requests, with fresh readings every thousand; tell errors, switches of the model, and memory."""
    errors, sizes, versions = 0, [], [b"0"]
    started, tenth = time.perf_counter(), max(1, requests // 10)
    for done in range(requests):
        if done % 1000 == 0:
            connection = Connection(port, "/v1/forecast", headers, _readings())
        if done % tenth == 0:
            sizes.append(_resident_mib(pid))
            _serve_model(link, (len(sizes) + 1) % 2)
        status, body = connection.ask()
        errors += status != 200
        version = body.partition(b'"model_version":"')[2][:1]
        if version != versions[-1]:
            versions.append(version)
    sizes.append(_resident_mib(pid))
    rate = requests / (time.perf_counter() - started)
    print(f"soak: {requests:,} requests, {errors} errors, {len(versions) - 1} model switches, {rate:.0f} requests/s")
    print("resident MiB: " + " ".join(f"{size:.1f}" for size in sizes))


def _resident_mib(pid: int) -> float:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
