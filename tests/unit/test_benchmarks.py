"""The benchmarks, on a model small enough to run them in seconds. What they time is no matter here."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import codec, decode, load, machine, neighbour, ready, report, serve
from benchmarks.__main__ import main
from benchmarks.checkpoints import DIMS, Dims, checkpoint_of, write_checkpoint
from benchmarks.ours import Ours
from benchmarks.peer import PeerDecoder, make_clip, peer_folder
from benchmarks.peer import load as load_peer
from benchmarks.report import NONE, Table
from benchmarks.timing import Spread, in_turns
from benchmarks.weights import bytes_of, tensors_of
from handler.checkpoint import LM_FILE, Checkpoint, read_checkpoint
from handler.half import can_halve
from handler.lm.decode_attention import MaskedAttention
from handler.musicgen import MusicGen
from tests.pretend_cuda import pretend_cuda

TINY = Dims(64, 4, 2, filters=4, text_layers=1, text_hidden=64)
TINY_MELODY = Dims(64, 4, 2, melody=True, filters=4, text_layers=1, text_hidden=64)


@pytest.fixture(autouse=True)
def _quick_measures_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BUFFER_BYTES", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setattr(machine, "_MATRIX", {"cpu": 64, "cuda": 64})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "tiny"
    write_checkpoint(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MusicGen:
    return MusicGen.get_pretrained(checkpoint, "cpu", "float32", checkpoint / "hub")


def cells(table: Table, column: str) -> list[str]:
    return [row[list(table.columns).index(column)] for row in table.rows]


def number(cell: str) -> float:
    found = re.match(r"[\d.]+(e[-+]\d+)?", cell)
    assert found, cell
    return float(found.group())


def test_a_checkpoint_is_written_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(DIMS, "tiny", TINY)
    folder = checkpoint_of("tiny")
    written = (folder / LM_FILE).stat().st_mtime_ns
    assert checkpoint_of("tiny") == folder
    assert (folder / LM_FILE).stat().st_mtime_ns == written
    assert folder.is_relative_to(tmp_path)


@pytest.mark.parametrize("dims", [TINY, TINY_MELODY], ids=["text", "melody"])
def test_both_sides_compute_the_same_model(dims: Dims, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dims)
    side = Ours(MusicGen.get_pretrained(tmp_path, "cpu", "float32", tmp_path / "hub"), 1, 0.2)
    peer = load_peer(peer_folder(tmp_path), "float32", "cpu")
    sequence, codes = torch.randint(2048, (4, 12)), torch.randint(2048, (1, 4, 12))
    with torch.inference_mode():
        conditions = side.conditions()
        theirs = PeerDecoder(peer).logits(sequence, conditions)  # [R, S, K, card]
        torch.testing.assert_close(side.logits(sequence, conditions), theirs, rtol=0, atol=5e-5)
        audio = peer.audio_encoder.decode(codes[None], [None])[0]
        torch.testing.assert_close(side.model.compression_model.decode(codes), audio, rtol=0, atol=1e-5)


def test_a_step_reads_every_weight_it_uses_once(model: MusicGen) -> None:
    dim, layers, card, codebooks = TINY.dim, TINY.layers, 2048, 4
    attention, cross_attention, feed_forward, norms = 4 * dim**2, 2 * dim**2, 8 * dim**2, 3 * 2 * dim
    products = layers * (attention + cross_attention + feed_forward) + codebooks * card * dim
    side = Ours(model, 2, 0.4)
    with torch.inference_mode():
        side.begin()
        cross = bytes_of(tensors_of([model.lm.cross_keys_values(side.conditions()) for _ in range(2)]))
    past = 2 * layers * dim * 10 * 4 * 4  # keys and values in float32 of 10 positions, of 4 rows
    kept = products * (2 if can_halve() else 4)
    assert side.step_bytes() == kept + 4 * (layers * norms + 2 * dim) + past + cross


def test_the_decode_benchmark_measures_every_side(checkpoint: Path) -> None:
    [table] = decode.measure("tiny", checkpoint, "cpu", ["float32", "bfloat16"], ["float32"], [1, 2], 0.4)
    sides = list(zip(cells(table, "side"), cells(table, "dtype"), cells(table, "requests"), strict=True))
    ours = [("ours", dtype, n) for dtype in ("float32", "bfloat16") for n in ("1", "2")]
    assert sides == [("transformers", "float32", "1"), *ours]
    for milliseconds, rate, real_time in zip(
        cells(table, "ms a step, mean"), cells(table, "steps a second"), cells(table, "times real time"), strict=True
    ):
        assert number(rate) == pytest.approx(1e3 / number(milliseconds), rel=0.1)
        assert number(real_time) == pytest.approx(number(rate) / 50, rel=0.1, abs=0.01)
    assert cells(table, "times the peer")[0] == "1.00"
    errors = [number(cell) for cell in cells(table, "error of logits")]
    assert errors[0] == 0.0
    assert max(errors[1:3]) < 1e-5 < max(errors[3:]) < 0.1
    assert "Steps 2 to 21" in table.notes[0]


def test_the_neighbour_benchmark_measures_alone_and_beside_a_busy_process(checkpoint: Path) -> None:
    [table] = neighbour.measure("tiny", checkpoint, "cpu", 0.4)
    alone, beside = (number(table.rows[0][column].split()[0]) for column in (0, 1))
    assert min(alone, beside) > 0
    assert "GOMP_SPINCOUNT" in table.notes[0]


def test_the_decode_benchmark_runs_without_a_peer(checkpoint: Path) -> None:
    [table] = decode.measure("tiny", checkpoint, "cpu", ["float32"], [], [1], 0.2)
    assert cells(table, "times the peer") == [NONE]


def test_models_that_do_not_fit_together_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    with pytest.raises(SystemExit, match=r"float32, bfloat16 take .* --dtype"):
        decode.measure("tiny", checkpoint, "cpu", ["float32"], ["bfloat16"], [1], 0.2)


def test_the_codec_benchmark_compares_equal_audio(checkpoint: Path) -> None:
    [table] = codec.measure("tiny", checkpoint, "cpu", [0.5, 1.5], 0.4, 2, True)
    assert cells(table, "side") == ["ours", "ours, in chunks", "transformers"] * 2
    assert cells(table, "clip, s") == ["0.5"] * 3 + ["1.5"] * 3
    assert all(number(cell) < 1e-4 for cell in cells(table, "largest difference to the peer"))
    assert [cell == NONE for cell in cells(table, "over whole-clip decode")] == [True, False, True] * 2
    short, *_, long = (number(cell) for cell in cells(table, "limit, s"))
    assert 0 <= short <= long


def test_a_gpus_decode_codec_and_load_benchmarks_are_one_command_away(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.lm.static_step.attention_kernel", lambda *_: MaskedAttention())
    with pretend_cuda() as gpu:
        machine.describe("cuda")
        [decoded] = decode.measure(
            "tiny", checkpoint, "cuda", ["float16", "bfloat16"], ["float16", "float32"], [1, 2], 0.4
        )
        assert len(gpu.graphs) == 8  # of two dtypes and numbers of requests, which begin twice
        [coded] = codec.measure("tiny", checkpoint, "cuda", [0.5], 0.4, 1, True)
        for side, folder in (("ours", checkpoint), ("transformers", peer_folder(checkpoint))):
            assert ready.load(side, folder, "cuda", "float16").weight_bytes > 0
    assert cells(decoded, "side") == ["transformers"] * 2 + ["ours"] * 4
    assert all(number(cell) < 0.1 for cell in cells(decoded, "error of logits"))
    assert all(number(cell) < 1e-4 for cell in cells(coded, "largest difference to the peer"))


def test_the_load_benchmark_watches_a_process(checkpoint: Path) -> None:
    [table] = load.measure("tiny", checkpoint, "cpu", ["float32"], 1, False)
    assert cells(table, "side") == ["ours"]
    assert cells(table, "times the peer") == [NONE]
    assert number(cells(table, "whole process, s")[0]) >= number(cells(table, "import, s")[0])
    assert 0 < number(cells(table, "files, MB")[0]) < 1000


@pytest.mark.parametrize("side", ["ours", "transformers"])
def test_a_loaded_model_says_what_it_took(side: str, checkpoint: Path) -> None:
    folder = checkpoint if side == "ours" else peer_folder(checkpoint)
    loaded = ready.load(side, folder, "cpu", "float32")
    assert loaded.peak_bytes >= loaded.imported_bytes >= loaded.imported_anonymous_bytes > 0
    lm_parameters = (checkpoint / LM_FILE).stat().st_size / 2  # float16
    assert loaded.weight_bytes > 4 * 0.9 * lm_parameters


def test_the_serve_benchmark_asks_an_engine_for_music(checkpoint: Path) -> None:
    [table] = serve.measure("tiny", checkpoint, "cpu", "float32", 2, 0.4, 0.2, 1, with_peer=True)
    figures = {row[0]: row[1] for row in table.rows}
    assert table.title == "Serving, tiny, cpu, float32"
    assert figures["first audio of an idle engine"].endswith(" s")
    assert "2 requests of 0.4 s, one after another" in figures
    assert "transformers, one of these clips" in figures
    assert number(figures["together, times as fast as transformers making 2"]) > 0


def test_the_peer_makes_a_clip_of_the_length_that_is_asked_for(checkpoint: Path) -> None:
    folder = peer_folder(checkpoint)
    peer = load_peer(folder, "float32", "cpu")
    with torch.inference_mode():
        assert make_clip(peer, folder, "slow blues", 0.4).shape == (1, 0.4 * 32000)


def test_checkpoints_hold_float16_as_published_or_what_needs_float32(checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, float32=True)
    name = "transformer.layers.0.linear1.weight"
    published, wide = (read_checkpoint(folder / LM_FILE) for folder in (checkpoint, tmp_path))
    assert isinstance(published, Checkpoint)
    assert isinstance(wide, Checkpoint)
    assert torch.equal(published.state[name], wide.state[name].half())
    assert published.state[name].dtype is torch.float16
    assert not torch.equal(wide.state[name].half().float(), wide.state[name])


def test_serving_is_measured_with_both_kinds_of_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[tuple[str, Path, str | None]] = []

    def measure(name: str, folder: Path, device: str, dtype: str | None, *how: float) -> list[Table]:
        measured.append((name, folder, dtype))
        return []

    monkeypatch.setattr(serve, "checkpoint_of", lambda name, float32=False: tmp_path / f"{name}{float32}")
    monkeypatch.setattr(serve, "measure", measure)
    arguments = {"dims": "small", "requests": 8, "duration": 8.0, "chunk": 1.0, "repeats": 1, "peer": "none"}
    serve.run(Namespace(**arguments, dtype=None, device="cpu"))
    serve.run(Namespace(**arguments, dtype=["bfloat16", "int8"], device="cpu"))
    serve.run(Namespace(**arguments, dtype=None, device="cuda"))
    published = tmp_path / "smallFalse"
    assert measured == [
        ("small", published, None),
        ("small with weights that float16 cannot hold", tmp_path / "smallTrue", None),
        ("small", published, "bfloat16"),
        ("small", published, "int8"),
        ("small", published, None),
    ]


def test_all_writes_the_section_of_its_dimensions_and_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("Decode step", ("side", "ms"), [("ours", "1.0")], ["measured twice"])
    benchmarks = {name: (lambda args: [table], "") for name in ("decode", "codec", "load", "serve")}
    monkeypatch.setattr("benchmarks.__main__.BENCHMARKS", benchmarks)
    results = tmp_path / "RESULTS.md"
    report.write(results, "large, cuda", {"GPU": "some"}, [table])
    main(["all", "--output", str(results)])
    main(["all", "--output", str(results)])
    text = results.read_text()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == ["large, cuda", "small, cpu"]
    assert text.count("| ours | 1.0 |") == 5
    for fact in ("date", "CPU", "memory", "torch", "transformers", "this project"):
        assert f"- {fact}: " in text
    assert "### Decode step" in capsys.readouterr().out


def test_a_row_must_fit_its_columns() -> None:
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        Table("t", ("a",), [("1", "2")])


def test_sides_take_turns() -> None:
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in "ab"}
    times = in_turns(calls, 3, "cpu", "test")
    assert called == list("abbaab")
    assert [len(spread.values) for spread in times.values()] == [3, 3]


def test_a_spread_shows_its_median_and_quartiles() -> None:
    spread = Spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert f"{spread:.1f}" == "3.0 (2.0 to 4.0)"
    assert spread.mean == 22.0
    assert f"{Spread([2.0]):.0f}" == "2 (2 to 2)"
    assert list(spread.over(spread.scaled(0.5)).values) == [2.0] * 5


def test_the_machine_is_measured_and_named(checkpoint: Path) -> None:
    read, size = machine.memory_reader("cpu")
    assert read() == size / 4
    assert machine.matmul_rate("cpu") > 0
    assert machine.file_bandwidth([checkpoint / LM_FILE]) > 0
    assert "cores" in machine.describe("cpu")["CPU"]
