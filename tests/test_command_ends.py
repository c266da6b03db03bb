"""Start and end of commands: no traceback, one message, the right exit status."""

import logging
import os
import pty
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.table import Table

from exactflow import __version__
from exactflow.cli import main, running
from exactflow.cli.arguments import VERBS
from exactflow.cli.parsing import parsed
from exactflow.cli.terminal import printable, say
from exactflow.parallel.process_group import ProcessLostError

SOURCES = str(Path(__file__).parents[1] / "src")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Run a command whose verb is replaced by a function: status, stdout and stderr."""

    def run(verb: Callable[[], None], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(
            running, "import_module", lambda _: SimpleNamespace(run=lambda _: verb())
        )
        monkeypatch.setattr(sys, "argv", ["exactflow", *(words or ("demo",))])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def raising(error: BaseException) -> Callable[[], None]:
    def verb() -> None:
        raise error

    return verb


def python(code: str, *words: str, **options) -> subprocess.Popen:
    """Run a new interpreter; nothing that is run here imports torch."""
    environment = {**os.environ, "PYTHONPATH": SOURCES, **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment, **options)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("expected [/x], got \x1b[31m'é\udce9'"),
            "expected [/x], got \\x1b[31m'é\\udce9'",
        ),
        (ZeroDivisionError("none of 3 samples is finite"), "none of 3 samples is finite"),
        (FileNotFoundError("no such file"), "no such file"),
        (ProcessLostError("process 0 of 2 is lost"), "process 0 of 2 is lost"),
    ],
)
def test_a_foreseen_error_is_one_message(error: Exception, message: str, ends) -> None:
    assert ends(raising(error)) == (1, "", f"error: {message}\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory. Tried ...\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...\nmore"),
    ],
)
def test_full_memory_is_no_fault_of_the_program(error: Exception, ends) -> None:
    status, _, said = ends(raising(error))
    assert status == 1
    assert said.startswith("error: out of memory: a smaller batch")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error", [IndexError("at 3\nmore"), KeyError("k"), RecursionError(), TypeError("[/x]")]
)
def test_an_unforeseen_error_is_one_line_and_a_log(error: Exception, ends, tmp_path: Path) -> None:
    status, printed, said = ends(raising(error), "demo", "--out", "a b")
    assert (status, printed) == (70, "")
    assert said.startswith(f"error: {type(error).__name__}")
    assert said.count("\n") == 1
    (log,) = tmp_path.glob("*.log")
    assert str(log) in said
    text = log.read_text()
    for part in ("Traceback", type(error).__name__, "--out 'a b'", __version__):
        assert part in text


def test_the_log_may_be_impossible(ends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def verb() -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        raise IndexError("at 3")

    status, _, said = ends(verb)
    assert status == 70
    assert "Traceback" in said, "it must be somewhere"
    assert "no log file" in said


def test_interruption_is_one_line(ends) -> None:
    assert ends(raising(KeyboardInterrupt())) == (130, "", "interrupted\n")


def test_interruption_at_the_start_is_one_line() -> None:
    code = (
        "import signal\nimport exactflow.cli.parsing as parsing\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may ignore it
        "parsing.parsed = lambda words: signal.raise_signal(signal.SIGINT) or 1 / 0\n"
        "from exactflow.cli import main\nmain()"
    )
    process = python(code, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    assert (process.returncode, said) == (130, "interrupted\n")


def test_a_reader_that_goes_away_ends_every_verb(ends, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 100_000):  # less and more than a pipe holds
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert ends(lambda count=count: say(Table("a"), "word " * count))[::2] == (141, "")


def test_another_broken_pipe_is_an_error(ends) -> None:
    status, _, said = ends(raising(BrokenPipeError(32, "Broken pipe")))
    assert (status, said) == (1, "error: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize("words", [["info"], ["--help"], ["train", "--help"]])
def test_head_ends_silently(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from exactflow.cli import main; main()"
    process = python(code, *words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    _, said = process.communicate()
    assert (process.returncode, said) == (141, "")


@pytest.mark.parametrize("plain", [True, False])
def test_usage_has_colours_unless_unwanted(plain: bool) -> None:
    leader, follower = pty.openpty()
    code = "from exactflow.cli import main; main()"
    env = {"TERM": "xterm-256color", "NO_COLOR": "1" if plain else ""}
    process = python(code, "sample", "x", "--seeed", "3", stdout=follower, stderr=follower, env=env)
    os.close(follower)
    said = b""
    try:
        while part := os.read(leader, 65536):
            said += part
    except OSError:  # the other side is closed
        pass
    os.close(leader)
    assert process.wait() == 2
    assert b"--seed" in said
    assert (b"\x1b[" in said) is not plain


NO_TORCH = """
import sys, io, contextlib
from exactflow.cli import main
for words in (
    ["train", "tarflow-digitz"], ["train", "tarflow-digits", "trainig.steps=3"],
    ["train", "tarflow-digits", "steps=3"], ["train", "--config", "none.yaml"],
    ["sample", "nowhere"], ["evaluate", "no/where/at/all"], ["evaluate", "a/b", "model.x=3"],
    ["info", "tarflow-tini"], ["info", "training.steps=3", "data.limit"],
    ["compare", "tarflow-tini"],
    ["info"], ["--version"], ["sample", "x", "model.width=3"], ["demo", "protocol.seed=1"],
):
    sys.argv = ["exactflow", *words]
    try: main()
    except SystemExit as end: status = end.code
    else: status = 0
    assert (not status) == (words in (["info"], ["--version"])), words
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""


def test_what_can_be_seen_at_once_needs_no_torch(tmp_path: Path) -> None:
    process = python(
        NO_TORCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    printed, said = process.communicate()
    assert process.returncode == 0, said
    assert "460,142,784" in printed, "the list of presets"
    assert f"exactflow {__version__}\n" in printed
    for message in ("did you mean 'tarflow-digits'", "did you mean 'training'", "got 'steps=3'"):
        assert message in said
    for message in ("none.yaml: no such settings file", "got 'nowhere': no such folder"):
        assert message in said
    for message in ("'no/where/at/all': no such folder", "takes no settings", "did you mean"):
        assert message in said


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture) -> None:
    name = "runs/[v2] [/x] :smile: \x1b[31mred \u202e \udce9"
    shown = "runs/[v2] [/x] :smile: \\x1b[31mred \\u202e \\udce9"
    assert printable(name) == shown
    assert printable("ä σ 中\n\t") == "ä σ 中\n\t"
    table = Table(title=name)
    table.add_column(name, min_width=70)
    table.add_row(name)
    say(table, name)
    printed = capsys.readouterr().out
    assert printed.count(shown) == 4
    assert "\x1b" not in printed


def test_warnings_and_logs_are_lines(ends) -> None:
    def verb() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = running.show_warning
            warnings.warn("a \x1b[1mname\nin two lines", stacklevel=1)
        logging.getLogger("exactflow.data").warning("skipped %s", "\x1b[1mname")

    _, _, said = ends(verb)
    assert said.splitlines()[0] == "warning: a \\x1b[1mname in two lines"
    assert "skipped \\x1b[1mname\n" in said


def test_a_name_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "v1.0=x"):
        (tmp_path / name).mkdir()
        assert parsed(["sample", name]).model == name
        assert parsed(["plan", "--device", "cpu", name]).model == name
    assert parsed(["evaluate", "lr=0.1", "data.limit=3"]).settings == ("data.limit=3",)
    command = parsed(["train", "tarflow-digits", "--out", "lr=0.2", "training.steps=3"])
    assert (command.out, command.settings) == (Path("lr=0.2"), ("training.steps=3",))


def test_home_is_found_in_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    home = Path("/home/somebody")
    assert parsed(["train", "tarflow-digits", "--out=~/x"]).out == home / "x"
    assert parsed(["train", "--config=~/c.yaml"]).config == home / "c.yaml"
    assert parsed(["sample", "~/m"]).model == str(home / "m")
    assert parsed(["compare", "~/m", "tarflow-tiny"]).models == (str(home / "m"), "tarflow-tiny")
    assert parsed(["results", "x", "--runs", "~/a", "b"]).runs == (home / "a", Path("b"))
    assert parsed(["prepare", "~/p", "out"]).source == str(home / "p")


def test_every_verb_prints_by_one_door() -> None:
    """A default console of rich reads names as markup, and fails on a closed pipe."""
    for verb in VERBS:
        text = (Path(SOURCES) / "exactflow" / "cli" / f"{verb}.py").read_text()
        assert "Console().print" not in text, verb
        assert "console.print(" not in text, verb
