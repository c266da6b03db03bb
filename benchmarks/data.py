"""Images per second of preparing a data set, and of reading it for training.

    python benchmarks/data.py --data DATA --out FILE.json

A JPEG folder and tar shards are made of smooth synthetic photographs, 500 pixels on the short side
as ImageNet has them; the parquet file is DATA/cifar10-jpeg. Every line is the median of some rounds
of the same work on a warm file cache. The set that is read for training is larger than a
processor's caches. Streamed shards are the same tar shards by file://, with an empty or a filled
cache folder and an index. Workers are threads; pin the process to one core for numbers per core.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import hardware
from PIL import Image

from exactflow.data import (
    Augmentation,
    DataConfig,
    index_shards,
    load,
    prepare,
    training_batches,
)

SHORT, LONG = 375, 500  # pixels, as most images of ImageNet
QUALITY = 90
HEADER = ("job", "images", "images/s: median (min to max)")


def photographs(count: int) -> list[bytes]:
    """JPEGs of smooth pictures with some grain, of about 100 kB."""
    draws = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        coarse = draws.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((LONG, SHORT), Image.Resampling.BICUBIC)
        grain = draws.normal(0, 12, (SHORT, LONG, 3))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "jpeg", quality=QUALITY)
        encoded.append(stream.getvalue())
    return encoded


def write_sources(folder: Path, images: list[bytes], shards: int = 4) -> dict[str, Path]:
    """The same images as a folder of files and as tar shards."""
    for index, content in enumerate(images):
        file = folder / "jpeg" / str(index % 10) / f"{index:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (folder / "tar").mkdir()
    for shard in range(shards):
        with tarfile.open(folder / "tar" / f"{shard:03}.tar", "w") as archive:
            for index in range(shard, len(images), shards):
                members = {"jpg": images[index], "cls": str(index % 10).encode()}
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{index:05}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return {"JPEG folder": folder / "jpeg", "tar shards": folder / "tar"}


def rates(action: Callable[[], int], rounds: int) -> list[float]:
    """Images per second of each round, after one that warms up."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        count = action()
        found.append(count / (time.perf_counter() - began))
    return found[1:]


def prepared(config: DataConfig, folder: Path, workers: int) -> int:
    """Prepare a set anew; the number of its images."""
    shutil.rmtree(folder, ignore_errors=True)
    made = prepare(config, folder, workers=workers)
    return sum(len(dataset) for dataset in made.values())


def grow(folder: Path, count: int) -> None:
    """Repeat the training images of a prepared set until they exceed a processor's caches."""
    file, facts = folder / "train.bin", json.loads((folder / "prepared.json").read_text())
    train = facts["splits"]["train"]
    pixels, labels = file.read_bytes(), (folder / "train.labels").read_bytes()
    copies = max(1, count // train["count"])
    with file.open("wb") as stream:
        for _ in range(copies):
            stream.write(pixels)
    (folder / "train.labels").write_bytes(labels * copies)
    train["count"] *= copies
    facts["words"] |= {"validation_fraction": 0.0, "test_fraction": 0.0}
    facts["stored"]["train"] = train["count"]
    (folder / "prepared.json").write_text(json.dumps(facts))


def trained_on(source: Path, batch_size: int, images: int, augmentation: Augmentation) -> int:
    """Read training batches of about `images` images; the number of images read."""
    dataset = load(DataConfig(str(source)), "train")
    found = training_batches(dataset, batch_size, seed=0, augmentation=augmentation)
    batches = images // batch_size
    for _ in range(batches):
        next(found)
    return batch_size * batches


def streamed_on(config: DataConfig, batch_size: int, images: int, warm: bool) -> int:
    """Read training batches of streamed shards, from an empty cache folder or a warm one."""
    if not warm:
        shutil.rmtree(Path(str(config.cache_dir)) / "shards", ignore_errors=True)
    found = training_batches(load(config, "train"), batch_size, seed=0)
    batches = images // batch_size
    for _ in range(batches):
        next(found)
    return batch_size * batches


def line(job: str, images: int, found: list[float]) -> dict[str, Any]:
    """One line of the table."""
    return {"job": job, "images": images, "images/s": found}


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All lines except those whose data are missing."""
    rounds, workers, lines = arguments.rounds, arguments.workers, []
    jobs: dict[str, tuple[DataConfig, int]] = {}
    sources = write_sources(folder, photographs(arguments.images))
    for name, source in sources.items():
        config = DataConfig(str(source), image_size=64, channels=3)
        jobs[f"prepare: {name}, {LONG}x{SHORT} to 64x64"] = (config, arguments.images)
    cifar = None if arguments.data is None else arguments.data / "cifar10-jpeg"
    if cifar is not None and cifar.is_dir():
        limit = arguments.cifar
        jobs["prepare: parquet of JPEGs, 32x32"] = (DataConfig(str(cifar), limit=limit), limit)
    stores = []
    for number, (job, (config, _)) in enumerate(jobs.items()):
        out = folder / f"out-{number}"
        stores.append(out)
        found = rates(lambda c=config, o=out: prepared(c, o, workers), rounds)
        count = sum(file.stat().st_size for file in out.glob("*.bin"))
        shape = load(DataConfig(str(out)), "train").event_shape
        lines.append(line(job, count // int(np.prod(shape)), found))
    grow(stores[0], arguments.store)
    dataset = load(DataConfig(str(stores[0])), "train")
    augmentations = {"": Augmentation(), ", flips and shifts": Augmentation(True, 4.0)}
    for name, augmentation in augmentations.items():
        found = rates(
            lambda a=augmentation: trained_on(stores[0], arguments.batch, arguments.read, a), rounds
        )
        gibibytes = dataset.images.nbytes / 2**30
        job = f"batches of {arguments.batch}, 64x64{name}, {gibibytes:.1f} GiB in the file cache"
        lines.append(line(job, arguments.batch * (arguments.read // arguments.batch), found))
    return lines + streamed(arguments, folder, sources["tar shards"])


def streamed(arguments: argparse.Namespace, folder: Path, shards: Path) -> list[dict[str, Any]]:
    """The lines of streamed shards, and of their index."""
    names = sorted(file.stem for file in shards.glob("*.tar"))
    pattern = f"file://{shards}/{{{','.join(names)}}}.tar"
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0}
    config = DataConfig(
        pattern, image_size=64, channels=3, cache_dir=str(folder / "cache"), **whole
    )

    def indexed() -> int:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        found, _ = index_shards(pattern, cache_dir=config.cache_dir)
        return sum(map(len, found))

    lines = [
        line("index: tar shards by file://", arguments.images, rates(indexed, arguments.rounds))
    ]
    size = min(arguments.batch, arguments.images)
    for name, warm in (("to be fetched by file://", False), ("in the cache folder", True)):
        found = rates(
            lambda w=warm: streamed_on(config, size, arguments.images, w), arguments.rounds
        )
        job = f"streamed batches of {size}, {LONG}x{SHORT} to 64x64, shards {name}"
        lines.append(line(job, size * (arguments.images // size), found))
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The lines in Markdown."""
    rows = [HEADER, ("---", "---:", "---:")]
    for entry in lines:
        found = entry["images/s"]
        spread = f"({min(found):,.0f} to {max(found):,.0f})"
        rate = f"**{statistics.median(found):,.0f}** {spread}"
        rows.append((entry["job"], f"{entry['images']:,}", rate))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measure, print the table, and write the file of --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with cifar10-jpeg/")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--images", type=int, default=1500, help="photographs that are made")
    parser.add_argument("--store", type=int, default=200_000, help="images of the set that is read")
    parser.add_argument("--cifar", type=int, default=10_000, help="images of each split at most")
    parser.add_argument("--read", type=int, default=100_000, help="images in training batches")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="exactflow-data-") as folder:
        lines = measure(arguments, Path(folder))
    machine = {"workers": arguments.workers, **hardware(torch.device("cpu"))}
    machine["load before"] = f"{load_before:.1f}"
    print(table(lines))
    print("\nMeasured on:", "; ".join(f"{name} {value}" for name, value in machine.items()))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": machine, "lines": lines}, indent=2))


if __name__ == "__main__":
    main()
