"""A model keeps the names of its classes, and a label is the class of that name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import exactflow
import processes
from exactflow.cli import attributes, evaluate, sample
from exactflow.cli.arguments import Attributes, Evaluate, Sample
from exactflow.cli.contenders import Contenders
from exactflow.cli.settings import first_images, labels_named, resolve
from exactflow.core.model import GenerativeModel
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.data.classes import class_number
from exactflow.data.model_classes import classes_in
from exactflow.metrics.bits_per_dim import with_labels
from exactflow.runs import execute
from exactflow.training import TrainConfig, fit
from exactflow.training.budget import Budget

TINY = ("model.width=16", "model.blocks=2", "model.layers_per_block=1", "model.head_dim=16")
CONDITIONAL = "tarflow-mnist-4-128-4-4-0.10"
FAST = ("training.steps=2", "training.warmup_steps=1", "training.batch_size=8", "run.samples=1")


def photos(folder: Path, *classes: str, each: int = 12) -> str:
    """A folder for every class, with noise as images."""
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            image = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{index:02}.png")
    return str(folder)


def dataset(names: tuple[str, ...], labels: tuple[int, ...] | None = None) -> ImageDataset:
    count = len(names) if labels is None else len(labels)
    numbers = np.arange(count) if labels is None else np.array(labels)
    images = np.zeros((count, 1, 8, 8), np.uint8)
    return ImageDataset(images, numbers, "set", "1", "test", 256, names, "", "", "")


def model_of(*names: str, count: int | None = None) -> GenerativeModel:
    model = exactflow.build(
        "tarflow-tiny",
        image_shape=(1, 8, 8),
        width=16,
        head_dim=16,
        num_classes=count or len(names),
    )
    model.class_names = names
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    source = f"data.source={photos(folder / 'pets', 'cat', 'dog')}"
    settings = resolve("tarflow-tiny", (*TINY, *FAST, source, "model.num_classes=2"), None)
    execute(settings, folder / "run", "cpu")
    return folder / "run"


def test_the_card_of_a_model_names_its_classes(run: Path, tmp_path: Path) -> None:
    card = json.loads((run / "model" / "config.json").read_text())["card"]
    assert card["class names"] == ["cat", "dog"]
    assert "['cat', 'dog']" in (run / "model" / "README.md").read_text()
    model = exactflow.from_pretrained(run)
    assert model.class_names == ("cat", "dog")
    model.save_pretrained(tmp_path)
    assert exactflow.from_pretrained(tmp_path).class_names == ("cat", "dog")


def test_labels_find_their_class_by_name(run: Path, tmp_path: Path) -> None:
    model = exactflow.from_pretrained(run)
    dogs = DataConfig(photos(tmp_path / "dogs", "dog"), test_fraction=0.5)
    test = load(dogs, "test")
    for _, label in (with_labels(model, test), first_images(model, test, 99)):
        assert label is not None
        assert label.tolist() == [1] * len(test)
    for stranger in ("bird", "emu"):
        other = load(DataConfig(photos(tmp_path / stranger, stranger, "cat")), "test")
        with pytest.raises(ValueError, match=f"model, cat, dog; {stranger} also has {stranger}$"):
            with_labels(model, other)
    three = f"data.source={photos(tmp_path / 'three', 'cat', 'dog', 'emu')}"
    with pytest.raises(ValueError, match="three also has emu"):
        evaluate.run(Evaluate(model=str(run), settings=(three,), device="cpu"))


@pytest.mark.parametrize(
    ("model", "names", "numbers"),
    [
        (model_of("cat", "dog"), ("dog", "cat"), [1, 0]),
        (model_of("cat", "dog", "emu"), ("emu", "cat"), [2, 0]),
        (model_of("cat", "dog", "emu"), ("0", "1"), [0, 1]),  # no names: numbers of the classes
        (model_of("0", "1", "2"), ("0", "1"), [0, 1]),
        (model_of("1", "2"), ("2", "1"), [1, 0]),
        (model_of(count=3), ("0", "1"), [0, 1]),  # a model of an earlier version, or converted
        (model_of(count=2), ("cat", "dog"), [0, 1]),
        (model_of("cat", "dog"), ("0", "1", "2"), "2 classes, set has 3: 0, 1, 2"),
        (model_of("1", "2"), ("0", "1"), "set also has 0"),
        (model_of("0", "1"), ("cat", "dog"), "set also has cat, dog"),
        (model_of(count=2), ("dog",), "2 classes, set has 1: dog"),
        (model_of(count=2), ("0", "1", "2"), "2 classes, set has 3"),
    ],
)
def test_classes_are_mapped_by_name_or_refused(
    model: GenerativeModel, names: tuple[str, ...], numbers: list[int] | str
) -> None:
    if isinstance(numbers, str):
        with pytest.raises(ValueError, match=numbers):
            with_labels(model, dataset(names))
        return
    _, label = with_labels(model, dataset(names))
    assert label is not None
    assert label.tolist() == classes_in(model, dataset(names)).tolist() == numbers
    unlabelled = replace(dataset(names), labels=None, class_names=())
    with pytest.raises(ValueError, match="needs labels, the test split of set has none"):
        with_labels(model, unlabelled)


@pytest.mark.parametrize(
    ("names", "word", "number"),
    [
        (("cat", "dog"), "dog", 1),
        (("cat", "dog"), "0", 0),
        (("cat", "dog"), "null", 2),
        (("cat", "null"), "null", 1),
        (("1", "2"), "1", 0),
        (("cat", "dog"), "2", "the model has no class '2': expected one of cat, dog"),
        (("cat", "dog"), "-1", "no class '-1'"),
        (("cat", "dog"), "dgo", "did you mean 'dog'"),
        (("1", "2"), "0", "no class '0'"),
        (("0", "1"), "2", "no class '2'"),
        (tuple(map(str, range(1000))), "x", r"0, 1, .*9, \.\.\. \(1,000 in all\)"),
    ],
)
def test_a_word_is_a_class_by_name_then_by_number(
    names: tuple[str, ...], word: str, number: int | str
) -> None:
    model = model_of(*names)
    if isinstance(number, int):
        assert labels_named(model, [word, word]) == [number, number]
        if word != "null":
            assert class_number(word, names, "x") == number
        return
    with pytest.raises(ValueError, match=number):
        labels_named(model, [word])


def test_samples_are_drawn_of_named_classes(run: Path, tmp_path: Path) -> None:
    def drawn(*label: str) -> tuple[list[int] | None, bytes]:
        out = tmp_path / "-".join(label or ("none",))
        sample.run(Sample(model=str(run), n=2, label=label, out=out, device="cpu"))
        found = json.loads((out / "samples.json").read_text())["label"]
        return found, (out / "seed_000000.png").read_bytes()

    assert drawn("dog")[0] == [1, 1]
    assert drawn("dog", "cat")[0] == [1, 0]
    assert drawn("1") == drawn("dog")
    assert drawn("null")[0] == [2, 2]
    assert drawn("null")[1] == drawn()[1]
    with pytest.raises(ValueError, match="no class '2'"):
        drawn("2")
    model = exactflow.build("tarflow-tiny", width=16, head_dim=16)
    with pytest.raises(
        ValueError, match="expected no label for a model without classes, got 'cat'"
    ):
        labels_named(model, ["cat"])


def test_an_attribute_is_a_class_by_the_same_rule(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    attributes.run(Attributes(model=str(run), attribute="dog", n=1, strengths=(0.0,), out=out))
    assert json.loads((out / "attributes.json").read_text())["attribute"] == "dog"
    with pytest.raises(ValueError, match="pets has no class 'dgo': did you mean 'dog'"):
        attributes.run(Attributes(model=str(run), attribute="dgo", out=out))


def test_training_goes_on_with_the_same_classes_only(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=2, learning_rate=1e-3, steps=1, warmup_steps=0)
    cats = dataset(("cat", "dog"), (0, 1, 0, 1))
    model = model_of(count=2)
    fit(model, cats, config, tmp_path / "a", progress=False)
    assert model.class_names == ("cat", "dog")
    fit(model, cats, config, tmp_path / "b", progress=False)
    swapped = replace(cats, class_names=("dog", "cat"))
    with pytest.raises(ValueError, match="the classes cat, dog, the data have dog, cat"):
        fit(model, swapped, config, tmp_path / "c", progress=False)
    model.class_names = ()
    fit(model, swapped, config, tmp_path / "c", progress=False)
    assert model.class_names == ("dog", "cat")
    plain = exactflow.build("tarflow-tiny", image_shape=(1, 8, 8), width=16, head_dim=16)
    fit(plain, cats, config, tmp_path / "d", progress=False)
    assert plain.class_names == ()


def test_names_that_do_not_fit_the_model_are_refused(run: Path, tmp_path: Path) -> None:
    exactflow.from_pretrained(run).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    found = json.loads(file.read_text())
    for names in (["cat"], ["cat", 2]):
        found["card"]["class names"] = names
        file.write_text(json.dumps(found))
        with pytest.raises(ValueError, match="expected 2 class names, one for each class"):
            exactflow.from_pretrained(tmp_path)
    del found["card"]["class names"]  # of an earlier version
    file.write_text(json.dumps(found))
    model = exactflow.from_pretrained(tmp_path)
    assert (model.class_names, model.num_classes) == ((), 2)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_conditional_training_asks_for_labelled_validation_first(tmp_path: Path) -> None:
    source = photos(tmp_path / "pets", "cat", "dog")
    plain = tmp_path / "plain"
    plain.mkdir()
    for index in range(4):
        Image.new("L", (8, 8), index).save(plain / f"{index}.png")
    words = (f"data.source={source}", f"data.validation={plain}")
    settings = resolve("tarflow-tiny", (*TINY, *FAST, *words, "model.num_classes=2"), None)
    with pytest.raises(ValueError, match=r"2 classes needs labels, the validation split .* none"):
        execute(settings, tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()
    execute(resolve("tarflow-tiny", (*TINY, *FAST, *words), None), tmp_path / "run", "cpu")


@pytest.mark.parametrize(
    ("preset", "words", "classes", "remark"),
    [
        ("tarflow-tiny", (), 2, "set has 2 classes, tarflow-tiny is trained without them: .*=2 "),
        ("tarflow-tiny", ("model.num_classes=2",), 2, ""),
        ("tarflow-tiny", ("model.num_classes=0",), 2, ""),
        ("tarflow-tiny", (), 1, ""),
        ("tarflow-tiny", (), 0, ""),
        ("whitening-tiny", (), 2, ""),  # has no classes at all
        (CONDITIONAL, (), 2, ""),
        (CONDITIONAL, (), 0, f"set has no labels: {CONDITIONAL} is trained without its classes"),
    ],
)
def test_classes_that_are_not_used_are_mentioned(
    preset: str, words: tuple[str, ...], classes: int, remark: str
) -> None:
    settings = resolve(preset, (*words, "data.source=set"), None)
    labelled = dataset(tuple("ab"[:classes]), (0, 0))
    data = labelled if classes else replace(labelled, labels=None)
    assert bool(settings.unused_classes(data)) is bool(remark)
    assert re.match(remark, settings.unused_classes(data))
    if not remark:
        assert settings.fitted(data).model.__dict__.get("num_classes", 0) in (0, classes)


def test_training_says_it_at_the_start(tmp_path: Path) -> None:
    source = f"data.source={photos(tmp_path / 'pets', 'cat', 'dog')}"
    words = ["train", "tarflow-tiny", *TINY, *FAST, source, "--out", "run", "--device", "cpu"]
    said = processes.run("-m", "exactflow", *words, cwd=tmp_path)
    told = "pets has 2 classes, tarflow-tiny is trained without them: model.num_classes=2"
    assert said.returncode == 0, said.stderr
    assert said.stderr.startswith(told)


def test_a_comparison_asks_for_labelled_held_out_images_first(tmp_path: Path) -> None:
    large = np.zeros((2, 1, 28, 28), np.uint8)
    training = replace(dataset(("cat", "dog")), images=large)
    held_out = replace(training, labels=None, class_names=())
    shared = (DataConfig("set"), training)
    after = (Budget(seconds=1.0), tmp_path, torch.device("cpu"))
    Contenders([CONDITIONAL], *shared, training, *after)
    with pytest.raises(ValueError, match="2 classes needs labels"):
        Contenders([CONDITIONAL], *shared, held_out, *after)
