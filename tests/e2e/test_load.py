"""The heavy load, which `make load` runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from tqdm import tqdm

from archive_scripts.pack import pack
from handler.engine.process import QUIET_SECONDS
from tests.e2e.conftest import GOLDENS, Server, run_server
from tests.e2e.mixture import mixture

MEBIBYTE = 2**20
LEAK = 30  # MiB

pytestmark = [pytest.mark.load, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def melody_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    source, store = str(GOLDENS / "melody"), tmp_path_factory.mktemp("model-store")
    with pytest.MonkeyPatch.context() as patch:
        # A heap that is soon full: Java would otherwise take more and more before it looks for what it can let go.
        patch.setenv("JAVA_TOOL_OPTIONS", "-Xmx128m -XX:+UseSerialGC")
        yield from run_server([pack(source, name="melody", output=store, hub_dir=GOLDENS / "hub")])


def test_each_of_64_requests_at_once_gets_the_bytes_it_gets_alone(melody_server: Server) -> None:
    bodies = mixture(64, longest=40, melodies=True)
    together = melody_server.post_together(*bodies, model="melody")
    assert [reply.status_code for reply in together] == [200] * len(bodies)
    for body, reply in zip(tqdm(bodies, "alone"), together, strict=True):
        assert melody_server.post("melody", **body).content == reply.content, body


def test_memory_is_flat_over_a_thousand_requests(melody_server: Server) -> None:
    """After the first hundred. The rest bring 61 MiB of request bodies and take away as much audio, so whoever kept
    either would show.
    """
    engine = melody_server.engine("melody")
    [worker] = melody_server.workers("melody")
    processes = {"worker": worker, "engine": engine, "JVM": worker.parent()}
    kinds = mixture(100, longest=2, melodies=True)

    def mebibytes() -> dict[str, float]:
        return {name: process.memory_info().rss / MEBIBYTE for name, process in processes.items() if process}

    history = []
    with ThreadPoolExecutor(8) as pool, tqdm(total=1000, desc="requests") as bar:
        for round_number in range(10):
            bodies = [{**body, "seed": 100 * round_number + number} for number, body in enumerate(kinds)]
            for reply in pool.map(lambda body: melody_server.post("melody", **body), bodies):
                assert reply.status_code == 200, reply.text
                bar.update()
            time.sleep(2 * QUIET_SECONDS)  # the engine gives back what it no longer uses
            history.append(mebibytes())
            tqdm.write(
                f"after {bar.n:4d}: " + ", ".join(f"{name} {size:.0f} MiB" for name, size in history[-1].items())
            )
    for name, process in processes.items():
        assert isinstance(process, psutil.Process)
        assert process.is_running()
        assert history[-1][name] - history[0][name] < LEAK, name
