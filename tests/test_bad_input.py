"""Bad input ends in one clear error that names what was expected and what was given."""

import json
import re
from pathlib import Path

import pytest

from processes import run

EXPECTED = {
    "encode: shape": ("ValueError", r"\(batch, 1, 4, 4\).*got .*\(1, 3, 4, 4\)"),
    "encode: three axes": ("ValueError", r"\(batch, 1, 4, 4\).*got .*\(1, 4, 4\)"),
    "encode: integers": ("ValueError", "floating-point.*got torch.uint8"),
    "decode: shape": ("ValueError", r"\(batch, 4, 4\).*got .*\(1, 3, 4\)"),
    "loss: floats": ("ValueError", "integer images.*got torch.float32"),
    "loss: too bright": ("ValueError", r"0 \.\. 255, got 256 \.\. 256"),
    "loss: negative": ("ValueError", r"0 \.\. 255, got -1 \.\. -1"),
    "loss: empty": ("ValueError", "empty batch"),
    "label: -1": ("ValueError", r"0 \.\. 2, or 3 for a dropped label, got -1"),
    "label: too large": ("ValueError", r"got 4 \.\. 4"),
    "label: count": ("ValueError", r"shape \(2,\), got .*\(1,\)"),
    "label: floats": ("ValueError", "torch.int64.*got torch.float32"),
    "label: unconditional": ("ValueError", "unconditional"),
    "score: floats": ("ValueError", "integer images"),
    "score: k": ("ValueError", "k >= 1.*got 0"),
    "score: label": ("ValueError", r"0 \.\. 2"),
    "sample: n": ("ValueError", "n >= 1.*got 0"),
    "sample: solver": ("ValueError", "sequential.*got 'magic'"),
    "sample: tolerance": ("ValueError", "tolerance >= 0, got -1.0"),
    "sample: segments": ("ValueError", r"sum to 4 tokens, got \(1, 2\)"),
    "solver: start": ("ValueError", "'latent' or 'zeros', got 'noise'"),
    "solver: window": ("ValueError", "window of at least 1, got 32, 0"),
    "solver: step": ("ValueError", r"eager \| compiled \| graph, got 'fast'"),
    "plan: batch": ("ValueError", "batch_size >= 1, got 0"),
    "sample: label": ("ValueError", "unconditional"),
    "sample: labels": ("ValueError", r"shape \(3,\)"),
    "sample: guidance without label": ("ValueError", "attention temperature"),
    "sample: negative guidance": ("ValueError", "scale >= 0.*got -1"),
    "sample: denoise": ("ValueError", "trained with Gaussian noise"),
    "build: preset": ("ValueError", "did you mean 'tarflow-tiny'"),
    "build: field": ("ValueError", "did you mean 'blocks'"),
    "build: type": ("ValueError", "expected int, got 'three'"),
    "load: no folder": ("FileNotFoundError", "no such folder"),
    "load: empty folder": ("ValueError", "config.json"),
    "load: truncated": ("ValueError", "model.safetensors does not hold"),
    "load: foreign": ("ValueError", "no 'kind'"),
    "convert: no file": ("FileNotFoundError", "no such file"),
    "convert: text": ("ValueError", "not a PyTorch file of plain tensors"),
    "convert: list": ("ValueError", "flat state dict"),
    "convert: other model": (
        "ValueError",
        "no published checkpoint of TarFlow, MaCow, DenseFlow, iDDPM/ADM, HDiT or MaskDiT",
    ),
    "convert: safetensors": ("ValueError", "broken.safetensors is not a whole file"),
    "convert: half a U-Net": ("ValueError", "U-Net as OpenAI publishes it, got one without"),
    "convert: half an HDiT": ("ValueError", r"no 'mid_level.0.ff.down_proj.weight'"),
    "convert: half a MaCow": ("ValueError", "the weights of MaCow do not tell height"),
    "convert: unknown hint": ("ValueError", "hieght means nothing for HDiT, which takes channels"),
    "convert: preset": ("ValueError", "did you mean 'adm-imagenet64'"),
    "convert: preset of another kind": ("ValueError", "holds HDiT, not adm-imagenet64"),
    "convert: code": ("ValueError", "plain tensors"),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("broken")
    said = run(Path(__file__).with_name("bad_input.py"), folder, cwd=folder)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_every_case_is_expected(errors: dict[str, list[str]]) -> None:
    assert errors.keys() == EXPECTED.keys()


@pytest.mark.parametrize("case", EXPECTED)
def test_bad_input(case: str, errors: dict[str, list[str]]) -> None:
    kind, message = EXPECTED[case]
    assert errors[case][0] == kind, errors[case]
    assert re.search(message, errors[case][1], re.DOTALL), errors[case]
