"""Containers for target stores side by side: what each costs to write, to read at random and to share, and a bit flip.

All hold the same records in files of equal numbers of records; of each the way its documentation gives for reading a
row is taken, opened files are kept. Writing is timed by the clock, syncs included; reading from the page cache by the
processor's time. Where pyarrow or lmdb is not installed its rows are left out.
"""

import argparse
import importlib.util
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinymim.cli import run_command
from tinymim.files import atomic_path, environment, write_json, write_text
from tinymim.progress import Progress
from tinymim.store.layout import logits_arrays
from tinymim.store.official import record_type
from tinymim.store.targets import TargetStore
from tinymim.store.writer import TargetWriter

READERS = 4
Record = dict[str, Any]


class Container(Protocol):
    """A container: written chunk by chunk, read by the position of a record."""

    def __init__(self, folder: Path, topk: int, chunk: int, records: int) -> None: ...

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Write a chunk; it is on the disk when this returns."""

    def open(self) -> Callable[[int], Record]:
        """A reader of records."""


class Safetensors:
    """Ours: a safetensors file a chunk, mapped, a CRC-32 checked when it is opened."""

    def __init__(self, folder: Path, topk: int, chunk: int, records: int) -> None:
        self.folder = folder
        about = {"topk": topk, "classes": 2**15}
        keys = [f"{i:09d}" for i in range(records)]
        self.writer = TargetWriter(folder, keys, arrays=logits_arrays(topk), epochs=1, chunk=chunk, about=about)

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        self.writer.write(self.writer.layout.at(0, number), arrays)

    def open(self) -> Callable[[int], Record]:
        store = TargetStore.open(self.folder)
        return lambda at: store[f"{at:09d}", 0]  # by key, as it is used


class Published:
    """TinyViT's: packed records, seek and read; no checksum."""

    def __init__(self, folder: Path, topk: int, chunk: int, records: int) -> None:
        self.folder, self.chunk, self.kind = folder, chunk, record_type(topk)
        folder.mkdir()

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        rows = np.empty(len(arrays["seed"]), self.kind)
        for name, value in arrays.items():
            rows[name] = value
        with atomic_path(self.folder / f"rank{number}-values.bin") as part:
            part.write_bytes(rows.tobytes())

    def open(self) -> Callable[[int], Record]:
        files = [open(path, "rb") for path in sorted(self.folder.iterdir(), key=lambda p: (len(p.name), p.name))]  # noqa: SIM115

        def read(at: int) -> Record:
            number, row = divmod(at, self.chunk)
            files[number].seek(row * self.kind.itemsize)
            record = np.frombuffer(files[number].read(self.kind.itemsize), self.kind)[0]
            return {name: record[name] for name in record.dtype.names}

        return read


class ArrowFile:
    """Arrow IPC: a file a chunk, columns of fixed-size lists, mapped."""

    def __init__(self, folder: Path, topk: int, chunk: int, records: int) -> None:
        self.folder, self.topk, self.chunk = folder, topk, chunk
        folder.mkdir()

    def table(self, arrays: dict[str, np.ndarray]) -> Any:
        import pyarrow as pa

        columns = {"seed": pa.array(arrays["seed"].astype(np.int32))}
        for name, kind in (("values", np.float16), ("indices", np.uint16)):
            flat = pa.array(arrays[name].astype(kind).ravel())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, self.topk)
        return pa.table(columns)

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        import pyarrow as pa

        table = self.table(arrays)
        with atomic_path(self.folder / f"{number:06d}.arrow") as part, pa.ipc.new_file(str(part), table.schema) as file:
            file.write_table(table)

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        import pyarrow as pa

        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return self.arrays(table)

    def arrays(self, table: Any) -> dict[str, np.ndarray]:
        found = {"seed": table["seed"].chunk(0).to_numpy()}
        for name in ("values", "indices"):
            found[name] = table[name].combine_chunks().flatten().to_numpy().reshape(-1, self.topk)
        return found

    def open(self) -> Callable[[int], Record]:
        opened: dict[int, dict[str, np.ndarray]] = {}
        paths = sorted(self.folder.iterdir())

        def read(at: int) -> Record:
            number, row = divmod(at, self.chunk)
            if number not in opened:
                opened[number] = self.rows(paths[number])
            return {name: value[row].copy() for name, value in opened[number].items()}

        return read


class Parquet(ArrowFile):
    """Parquet: a file a chunk, uncompressed, page checksums; a row means reading its row group into memory."""

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        import pyarrow.parquet as pq

        with atomic_path(self.folder / f"{number:06d}.parquet") as part:
            pq.write_table(self.table(arrays), part, compression="none", write_page_checksum=True, use_dictionary=False)

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        import pyarrow.parquet as pq

        return self.arrays(pq.read_table(path, page_checksum_verification=True))


class Lmdb:
    """LMDB: one file for all, a B+ tree of keys; one process writes at a time."""

    def __init__(self, folder: Path, topk: int, chunk: int, records: int) -> None:
        self.folder, self.chunk, self.kind = folder, chunk, record_type(topk)
        self.most = records * (self.kind.itemsize + 64) * 2 + (64 << 20)
        self.env: Any = None

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        import lmdb

        if self.env is None:
            self.env = lmdb.open(str(self.folder), map_size=self.most)
        rows = np.empty(len(arrays["seed"]), self.kind)
        for name, value in arrays.items():
            rows[name] = value
        with self.env.begin(write=True) as writing:
            for i, row in enumerate(rows):
                writing.put(struct.pack(">I", number * self.chunk + i), row.tobytes())

    def open(self) -> Callable[[int], Record]:
        import lmdb

        if self.env is not None:
            self.env.close()  # once in a process
        self.env = lmdb.open(str(self.folder), readonly=True, lock=False)
        reading = self.env.begin(buffers=True)

        def read(at: int) -> Record:
            record = np.frombuffer(reading.get(struct.pack(">I", at)), self.kind)[0]
            return {name: record[name] for name in record.dtype.names}

        return read


CONTAINERS: dict[str, tuple[type[Container], str | None, str]] = {  # name -> class, package, through fsspec
    "safetensors": (Safetensors, None, "whole files"),
    "Arrow IPC": (ArrowFile, "pyarrow", "whole files"),
    "Parquet": (Parquet, "pyarrow", "whole files"),
    "LMDB": (Lmdb, "lmdb", "no: one growing file"),
    "TinyViT's files": (Published, None, "whole files"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--topk", type=int, nargs="+", default=[100, 10])
    parser.add_argument("--records", type=int, default=131_072)
    parser.add_argument("--chunk", type=int, default=4096, help="records of a file")
    parser.add_argument("--reads", type=int, default=50_000, help="random reads of a process")
    parser.add_argument("--out", default="docs/store_containers", help="result without its ending")


def made_up(rng: np.random.Generator, rows: int, topk: int) -> dict[str, np.ndarray]:
    """Records of a chunk."""
    values = -np.sort(-rng.dirichlet(np.full(topk, 0.1), rows), 1)
    return {
        "seed": rng.integers(0, 2**31, rows),
        "values": values,
        "indices": rng.integers(0, 2**15, (rows, topk)),
    }


def private_bytes() -> int:
    """Memory of this process that no other shares."""
    lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def measure(name: str, topk: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One container at one K."""
    kind, _, remote = CONTAINERS[name]
    rng = np.random.default_rng(0)
    made: Any = kind(folder, topk, args.chunk, args.records)
    chunks = [made_up(rng, args.chunk, topk) for _ in range(4)]
    began = time.perf_counter()
    count = args.records // args.chunk
    for number in range(count):
        made.write(number, chunks[number % 4])
    wrote = time.perf_counter() - began
    size = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    read = made.open()
    for at in rng.integers(0, args.records, 200):
        wanted, found = chunks[at // args.chunk % 4], read(int(at))
        assert found["seed"] == wanted["seed"][at % args.chunk]
        assert (found["indices"] == wanted["indices"][at % args.chunk]).all()
    readers = [_reader(made, args, i) for i in range(READERS)]
    answers = [os.read(pipe, 100).split() for _, pipe in readers]
    for pid, _ in readers:
        os.waitpid(pid, 0)
    order = rng.integers(0, args.records, args.reads)
    read = made.open()
    for at in order[:2000]:
        read(int(at))
    began = time.process_time()
    for at in order:
        read(int(at))
    spent = time.process_time() - began
    return {
        "container": name,
        "topk": topk,
        "write_per_s": count * args.chunk / wrote,
        "read_per_s": args.reads / spent,
        "bytes_per_view": size / args.records,
        "private_mib_of_a_reader": sum(int(private) for _, private in answers) / READERS / 2**20,
        "bit_flip": _flipped(made, folder, chunks[0]),
        "fsspec": remote,
    }


def _reader(made: Any, args: argparse.Namespace, seed: int) -> tuple[int, int]:
    """A process that reads at random and says how much private memory that took; its id and a pipe."""
    out, into = os.pipe()
    if pid := os.fork():
        os.close(into)
        return pid, out
    code = 1
    try:
        before, read = private_bytes(), made.open()
        for at in np.random.default_rng(seed).integers(0, args.records, args.reads // 5):
            read(int(at))
        os.write(into, f"{seed} {max(private_bytes() - before, 0)}\n".encode())
        code = 0
    finally:
        os._exit(code)


def _flipped(made: Any, folder: Path, chunk: dict[str, np.ndarray]) -> str:
    """What a reader does with a flipped bit in the first record's probabilities."""
    values = chunk["values"][0].astype(np.float16).tobytes()[:12]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if (at := content.find(values)) >= 0:
            path.write_bytes(content[: at + 1] + bytes([content[at + 1] ^ 4]) + content[at + 2 :])
            break
    else:
        return "not tried"
    try:
        found = made.open()(0)["values"]
    except Exception as error:  # whatever the library raises
        return f"an error ({type(error).__name__})"
    return "unnoticed" if (found != chunk["values"][0].astype(np.float16)).any() else "read around"


def run(args: argparse.Namespace) -> int:
    """Measure, print and write the table."""
    rows, names = (
        [],
        [name for name, (_, package, _) in CONTAINERS.items() if not package or importlib.util.find_spec(package)],
    )
    progress = Progress("containers", len(args.topk) * len(names))
    for topk in args.topk:
        for name in names:
            folder = Path(tempfile.mkdtemp(dir=Path(args.out).parent)) / "store"
            try:
                rows.append(measure(name, topk, args, folder))
            finally:
                shutil.rmtree(folder.parent, ignore_errors=True)
            progress.update(len(rows))
    progress.close()
    head = [
        "container",
        "K",
        "written/s",
        "read/s of a core",
        "bytes a view",
        "private MiB a reader",
        "a flipped bit",
        "fsspec",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["container"], row["topk"], f"{row['write_per_s']:,.0f}", f"{row['read_per_s']:,.0f}"]
        cells += [
            f"{row['bytes_per_view']:.1f}",
            f"{row['private_mib_of_a_reader']:.1f}",
            row["bit_flip"],
            row["fsspec"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    write_json(
        f"{args.out}.json", {"rows": rows, "records": args.records, "chunk": args.chunk, "environment": environment()}
    )
    write_text(f"{args.out}.md", text)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tools/bench_containers.py``."""
    return run_command("bench_containers", "containers for target stores", add_arguments, run, argv)
