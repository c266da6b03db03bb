"""Errors for bad input without the checker of annotations, as JSON, one for each case."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import exactflow
from exactflow.core.transform import Decoding
from exactflow.models.macow import published as macow_published
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.sampling.flow_solvers import Adaptive, GaussSeidelJacobi, Jacobi
from exactflow.sampling.planner import plan

warnings.simplefilter("error")
torch.set_num_threads(1)
MODEL = TarFlow(TarFlowConfig((1, 4, 4), 2, 64, 2, 1, num_classes=3))
PLAIN = TarFlow(TarFlowConfig((1, 4, 4), 2, 64, 2, 1))
GREY = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
X = torch.zeros(1, 1, 4, 4)
STEM = {"input_blocks.0.0.weight": torch.zeros(32, 3, 3, 3)}  # of OpenAI's U-Nets
PATCHES = {"patch_in.proj.weight": torch.zeros(64, 12)}  # of HDiT
BROKEN = Path(sys.argv[1])  # a folder to write broken files into


def converted(content: object, **hints: Any) -> None:
    path = BROKEN / "broken.pth"
    torch.save(content, path)
    exactflow.convert(path, **hints)


def text_file() -> None:
    path = BROKEN / "text.pth"
    path.write_text("not a checkpoint")
    exactflow.convert(path)


def broken_safetensors() -> None:
    path = BROKEN / "broken.safetensors"
    path.write_text("not a checkpoint")
    exactflow.convert(path)


def truncated_weights() -> None:
    PLAIN.save_pretrained(BROKEN / "model")
    file = BROKEN / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    exactflow.from_pretrained(BROKEN / "model")


def foreign_config() -> None:
    folder = BROKEN / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    exactflow.from_pretrained(folder)


CASES = {
    "encode: shape": lambda: MODEL.encode(torch.zeros(1, 3, 4, 4)),
    "encode: three axes": lambda: MODEL.encode(torch.zeros(1, 4, 4)),
    "encode: integers": lambda: MODEL.encode(GREY),
    "decode: shape": lambda: MODEL.decode(torch.zeros(1, 3, 4)),
    "loss: floats": lambda: MODEL.loss(X),
    "loss: too bright": lambda: MODEL.loss(torch.full((1, 1, 4, 4), 256)),
    "loss: negative": lambda: MODEL.loss(torch.full((1, 1, 4, 4), -1)),
    "loss: empty": lambda: MODEL.loss(GREY[:0]),
    "label: -1": lambda: MODEL.encode(X, torch.tensor([-1])),
    "label: too large": lambda: MODEL.encode(X, torch.tensor([4])),
    "label: count": lambda: MODEL.encode(torch.zeros(2, 1, 4, 4), torch.tensor([1])),
    "label: floats": lambda: MODEL.encode(X, torch.tensor([1.0])),
    "label: unconditional": lambda: PLAIN.encode(X, torch.tensor([0])),
    "score: floats": lambda: exactflow.log_likelihood(MODEL, X),
    "score: k": lambda: exactflow.log_likelihood(MODEL, GREY, k=0),
    "score: label": lambda: exactflow.log_likelihood(MODEL, GREY, torch.tensor([0, 7])),
    "sample: n": lambda: exactflow.sample(PLAIN, 0),
    "sample: solver": lambda: exactflow.sample(PLAIN, 1, solver="magic"),
    "sample: tolerance": lambda: exactflow.sample(PLAIN, 1, solver=Jacobi(tolerance=-1.0)),
    "sample: segments": lambda: exactflow.sample(PLAIN, 1, solver=GaussSeidelJacobi((1, 2))),
    "solver: start": lambda: Jacobi(start="noise"),
    "solver: window": lambda: Adaptive(window=0),
    "solver: step": lambda: Decoding(step="fast"),
    "plan: batch": lambda: plan(PLAIN, 0),
    "sample: label": lambda: exactflow.sample(PLAIN, 1, label=3),
    "sample: labels": lambda: exactflow.sample(MODEL, 3, label=[0, 1]),
    "sample: guidance without label": lambda: exactflow.sample(MODEL, 1, guidance=1.0),
    "sample: negative guidance": lambda: exactflow.sample(MODEL, 1, label=0, guidance=-1.0),
    "sample: denoise": lambda: exactflow.sample(
        PLAIN, 1, options=exactflow.SamplingOptions(denoise=True)
    ),
    "build: preset": lambda: exactflow.build("tarflow-tinny"),
    "build: field": lambda: exactflow.build("tarflow-tiny", blokcs=3),
    "build: type": lambda: exactflow.build("tarflow-tiny", blocks="three"),
    "load: no folder": lambda: exactflow.from_pretrained(BROKEN / "nowhere"),
    "load: empty folder": lambda: exactflow.from_pretrained(BROKEN),
    "load: truncated": truncated_weights,
    "load: foreign": foreign_config,
    "convert: no file": lambda: exactflow.convert(BROKEN / "none.pth"),
    "convert: text": text_file,
    "convert: list": lambda: converted([1, 2]),
    "convert: other model": lambda: converted({"conv.weight": torch.zeros(3)}),
    "convert: code": lambda: converted(MODEL),
    "convert: safetensors": broken_safetensors,
    "convert: half a U-Net": lambda: converted(STEM, height=64),
    "convert: half an HDiT": lambda: converted(PATCHES, height=64),
    "convert: half a MaCow": lambda: converted({macow_published.MARK: torch.zeros(3)}),
    "convert: unknown hint": lambda: converted(PATCHES, hieght=64),
    "convert: preset": lambda: converted(STEM, preset="adm-imagenet46"),
    "convert: preset of another kind": lambda: converted(PATCHES, preset="adm-imagenet64"),
}

results = {}
for name, call in CASES.items():
    try:
        call()
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]
    else:
        results[name] = ["nothing", "no error was raised"]
print(json.dumps(results))
