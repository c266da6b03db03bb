"""Laws of the code, checked on its syntax trees. Each is shown to fail on bad code."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "exactflow"

Tree = dict[str, ast.Module]  # path inside the package -> its syntax
Function = ast.FunctionDef | ast.AsyncFunctionDef

MAX_LINES = 400
HEAVY = ("tyro", "constriction", "imagecodecs", "gradio", "datasets", "beartype")
HEAVY += ("matplotlib", "sklearn", "torchvision")
ABSTRACT_BASES = {"ABC", "Protocol"}
VALUE_BASES = {"Enum", "IntEnum", "StrEnum", "Flag", "IntFlag", "NamedTuple", "TypedDict"}
MOST_LINES = 60  # of a function, its docstring included
PIXEL_NUMBERS = {255, 256, 127.5}  # and 128.0, but not the integer 128, which is a width
PIXEL_ROOMS = ("core/grey_levels.py", "data/")  # the file that knows 256, the decoding of files
WIDTH_ROOMS = ("models/", "nn/", "paths/")  # presets and widths of layers
SIZE_NAMES = {"batch_size", "channels", "width"}  # such an argument may be 256 anywhere


def parse(sources: dict[str, str]) -> Tree:
    return {path: ast.parse(text) for path, text in sources.items()}


def sources() -> dict[str, str]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in files}


def last_name(node: ast.expr) -> str:
    """`typing.final` -> final, `Protocol[T]` -> Protocol, `dataclass(frozen=True)` -> dataclass."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value=inner) | ast.Call(func=inner):
            return last_name(inner)
    return ""


def classes(tree: Tree) -> Iterator[tuple[str, ast.ClassDef]]:
    for path, module in tree.items():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                yield path, node


def methods(node: ast.ClassDef) -> Iterator[Function]:
    return (item for item in node.body if isinstance(item, Function))


def is_abstract(method: Function) -> bool:
    return any(last_name(d) == "abstractmethod" for d in method.decorator_list)


def base_names(node: ast.ClassDef) -> list[str]:
    keywords = [k.value for k in node.keywords if k.arg == "metaclass"]
    return [last_name(b) for b in [*node.bases, *keywords]]


def ancestors(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """The project's own classes above `node`, nearest first."""
    for name in base_names(node):
        if name in known and known[name] is not node:
            yield known[name]
            yield from ancestors(known[name], known)


def every_class_is_abstract_or_final(tree: Tree) -> Iterator[str]:
    known = {node.name: node for _, node in classes(tree)}
    for path, node in classes(tree):
        above = set(base_names(node))
        for parent in ancestors(node, known):
            above.update(base_names(parent))
        final = any(last_name(d) == "final" for d in node.decorator_list)
        abstract = bool({*ABSTRACT_BASES, "ABCMeta"} & set(base_names(node)))
        abstract |= any(is_abstract(m) for m in methods(node))
        value = bool(above & VALUE_BASES)
        error = any(name.endswith(("Error", "Exception", "Warning")) for name in above)
        if final and abstract:
            yield f"{path}:{node.lineno} {node.name} is both abstract and final"
        if not (final or abstract or value or error):
            yield f"{path}:{node.lineno} {node.name} is neither abstract nor @final"


def nothing_concrete_is_overridden(tree: Tree) -> Iterator[str]:
    """Except constructors, which call the inherited one and add to it."""
    known = {node.name: node for _, node in classes(tree)}
    for path, node in classes(tree):
        for parent in ancestors(node, known):
            concrete = {m.name for m in methods(parent) if not is_abstract(m)}
            for method in methods(node):
                if method.name in concrete - {"__init__", "__post_init__", "__init_subclass__"}:
                    where = f"{path}:{method.lineno} {node.name}.{method.name}"
                    yield f"{where} overrides the concrete {parent.name}.{method.name}"


def no_file_is_a_drawer(tree: Tree) -> Iterator[str]:
    for path in tree:
        if set(Path(path).with_suffix("").parts) & {"utils", "util", "helpers", "misc", "common"}:
            yield f"{path}: say what is in it"


def functions_fit_a_screen(tree: Tree) -> Iterator[str]:
    for path, module in tree.items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES:
                    yield f"{path}:{node.lineno} {node.name} has {lines} lines"


def no_torchvision(tree: Tree) -> Iterator[str]:
    for path, module in tree.items():
        for node in ast.walk(module):
            match node:
                case ast.Import(names=names):
                    imported = [alias.name for alias in names]
                case ast.ImportFrom(module=str(name)):
                    imported = [name]
                case _:
                    continue
            if any(name.split(".")[0] == "torchvision" for name in imported):
                yield f"{path}:{node.lineno} imports torchvision"


def no_hasattr(tree: Tree) -> Iterator[str]:
    for path, module in tree.items():
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and last_name(node.func) == "hasattr":
                yield f"{path}:{node.lineno} switches on hasattr"


def no_open_constructor(tree: Tree) -> Iterator[str]:
    for path, node in classes(tree):
        for method in methods(node):
            if method.name == "__init__" and method.args.kwarg is not None:
                yield f"{path}:{method.lineno} {node.name}.__init__ takes **{method.args.kwarg.arg}"


def no_mutable_default(tree: Tree) -> Iterator[str]:
    for path, module in tree.items():
        for node in ast.walk(module):
            if isinstance(node, Function | ast.Lambda):
                for default in [*node.args.defaults, *node.args.kw_defaults]:
                    if isinstance(default, ast.List | ast.Dict | ast.Set):
                        yield f"{path}:{default.lineno} has a mutable default"


def public_things_are_documented(tree: Tree) -> Iterator[str]:
    """Modules, classes, functions, and abstract methods, which declare a contract."""
    for path, module in tree.items():
        if module.body and ast.get_docstring(module) is None:
            yield f"{path} has no docstring"
        for node in module.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                yield f"{path}:{node.lineno} {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                for method in methods(node):
                    if is_abstract(method) and ast.get_docstring(method) is None:
                        yield f"{path}:{method.lineno} {node.name}.{method.name} has no docstring"


def sizes(module: ast.Module) -> Iterator[ast.AST]:
    """Values of arguments, keywords and fields that are sizes by their name."""
    for node in ast.walk(module):
        match node:
            case ast.keyword(arg=str(name), value=value) if name in SIZE_NAMES:
                yield value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                if name in SIZE_NAMES:
                    yield value
            case ast.arguments():
                plain = [*node.posonlyargs, *node.args]
                given = plain[len(plain) - len(node.defaults) :]
                pairs = [*zip(given, node.defaults, strict=True)]
                pairs += [*zip(node.kwonlyargs, node.kw_defaults, strict=True)]
                yield from (v for a, v in pairs if v is not None and a.arg in SIZE_NAMES)


def one_file_knows_256(tree: Tree) -> Iterator[str]:
    for path, module in tree.items():
        if path.startswith((*PIXEL_ROOMS, *WIDTH_ROOMS)):
            continue
        allowed = {id(value) for value in sizes(module)}
        for node in ast.walk(module):
            if not isinstance(node, ast.Constant) or id(node) in allowed:
                continue
            value = node.value
            if isinstance(value, int | float) and (
                value in PIXEL_NUMBERS or (isinstance(value, float) and value == 128.0)
            ):
                yield f"{path}:{node.lineno} knows {value}: that belongs in core/grey_levels.py"


Law = Callable[[Tree], Iterator[str]]
BREACHES: list[tuple[Law, str, str]] = [  # (law, path, a source that breaks it exactly once)
    (every_class_is_abstract_or_final, "a.py", "class A: pass"),
    (every_class_is_abstract_or_final, "a.py", "class A(nn.Module):\n def f(self): pass"),
    (every_class_is_abstract_or_final, "a.py", "class A(ABC): pass\nclass B(A): pass"),
    (every_class_is_abstract_or_final, "a.py", "@final\nclass A(Protocol[T]): pass"),
    (every_class_is_abstract_or_final, "a.py", "def f():\n class A: pass"),
    (
        nothing_concrete_is_overridden,
        "a.py",
        "class A(ABC):\n def f(self): pass\n@final\nclass B(A):\n def f(self): pass",
    ),
    (
        nothing_concrete_is_overridden,
        "a.py",
        "class A(ABC):\n def f(self): pass\nclass B(A, ABC): pass\n"
        "@final\nclass C(m.B[T]):\n def f(self): pass",
    ),
    (no_file_is_a_drawer, "core/utils.py", ""),
    (no_file_is_a_drawer, "utils/images.py", ""),
    (no_torchvision, "a.py", "import torchvision.transforms as T"),
    (no_torchvision, "a.py", "def f():\n from torchvision import models"),
    (no_hasattr, "a.py", "if hasattr(model, 'decode'): pass"),
    (no_open_constructor, "a.py", "class A:\n def __init__(self, x, **kwargs): pass"),
    (no_mutable_default, "a.py", "def f(x, y=[]): pass"),
    (no_mutable_default, "a.py", "def f(*, y={}): pass"),
    (public_things_are_documented, "a.py", "x = 1"),
    (public_things_are_documented, "a.py", "'''Doc.'''\ndef f(): pass"),
    (public_things_are_documented, "a.py", "'''Doc.'''\nclass A: pass"),
    (
        public_things_are_documented,
        "a.py",
        "'''Doc.'''\nclass A:\n '''Doc.'''\n @abstractmethod\n def f(self): pass",
    ),
    (functions_fit_a_screen, "a.py", "def f():\n" + " x = 1\n" * 60),
    (one_file_knows_256, "a.py", "x = y / 127.5"),
    (one_file_knows_256, "sampling/a.py", "x = y * 255"),
    (one_file_knows_256, "likelihood/a.py", "x = log(256.0)"),
    (one_file_knows_256, "core/transform.py", "x = -128.0"),
    (one_file_knows_256, "a.py", "def f(levels=256, batch_size=256): pass"),
]
FINE: list[tuple[Law, str, str]] = [
    (every_class_is_abstract_or_final, "a.py", "@typing.final\n@dataclass\nclass A: pass"),
    (every_class_is_abstract_or_final, "a.py", "class A(nn.Module, ABC): pass"),
    (every_class_is_abstract_or_final, "a.py", "class A(B):\n @abstractmethod\n def f(self): ..."),
    (every_class_is_abstract_or_final, "a.py", "class A(metaclass=ABCMeta): pass"),
    (every_class_is_abstract_or_final, "a.py", "class A(enum.Enum): pass\nclass P(NamedTuple): 0"),
    (every_class_is_abstract_or_final, "a.py", "class A(ValueError): pass\nclass B(A): pass"),
    (
        nothing_concrete_is_overridden,
        "a.py",
        "class A(ABC):\n def __init__(self): pass\n @abstractmethod\n def f(self): pass\n"
        "@final\nclass B(A):\n def __init__(self): pass\n def f(self): pass",
    ),
    (functions_fit_a_screen, "a.py", "def f():\n" + " x = 1\n" * 59),
    (public_things_are_documented, "a.py", "'''Doc.'''\ndef _f(): pass\nclass _A: pass"),
    (public_things_are_documented, "__init__.py", ""),
    (one_file_knows_256, "core/grey_levels.py", "x = 127.5"),
    (one_file_knows_256, "data/folder.py", "x = y / 255"),
    (one_file_knows_256, "models/tarflow/model.py", "width = 256"),
    (one_file_knows_256, "a.py", "width = 128; y = 'a 256'; flag = True"),
    (one_file_knows_256, "a.py", "def f(x, *, batch_size: int = 256): g(x, batch_size=256)"),
    (one_file_knows_256, "a.py", "class A:\n batch_size: int = 256\n name: str"),
]
LAWS = list(dict.fromkeys(law for law, _, _ in BREACHES))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_holds(law: Law) -> None:
    breaches = list(law(parse(sources())))
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize(("law", "path", "text"), BREACHES)
def test_law_can_be_broken(law: Law, path: str, text: str) -> None:
    assert len(list(law(parse({path: text})))) == 1


@pytest.mark.parametrize(("law", "path", "text"), FINE)
def test_law_lets_good_code_pass(law: Law, path: str, text: str) -> None:
    assert list(law(parse({path: text}))) == []


def test_bases_are_found_across_files() -> None:
    tree = parse(
        {
            "flows/b.py": "@final\nclass B(A):\n def f(self): pass",
            "core/a.py": "class A(ABC):\n def f(self): pass",
        }
    )
    assert len(list(nothing_concrete_is_overridden(tree))) == 1


def test_there_is_code_to_judge() -> None:
    assert "__init__.py" in sources()


def loose_folders(paths: Iterable[str]) -> set[str]:
    """Folders with code but without __init__.py, which import-linter does not check."""
    present = set(paths)
    folders = {str(parent) for path in present for parent in list(Path(path).parents)[:-1]}
    return {folder for folder in folders if f"{folder}/__init__.py" not in present}


def test_every_folder_is_a_package() -> None:
    assert loose_folders(sources()) == set()


def test_a_loose_folder_is_found() -> None:
    assert loose_folders(["__init__.py", "core/__init__.py", "core/a.py", "nn/b.py"]) == {"nn"}


def test_class_names_are_unique() -> None:
    """The laws above find base classes by their names alone."""
    seen: dict[str, str] = {}
    for path, node in classes(parse(sources())):
        if not node.name.startswith("_"):
            assert node.name not in seen, f"{node.name} is in {seen[node.name]} and in {path}"
            seen[node.name] = path


def too_long(texts: dict[str, str]) -> list[str]:
    lengths = {path: len(text.splitlines()) for path, text in texts.items()}
    return [f"{path}: {lines} lines" for path, lines in lengths.items() if lines >= MAX_LINES]


def test_files_stay_short() -> None:
    assert too_long(sources()) == []


def test_a_long_file_is_found() -> None:
    assert too_long({"a.py": "x = 1\n" * MAX_LINES}) == [f"a.py: {MAX_LINES} lines"]
    assert too_long({"a.py": "x = 1\n" * (MAX_LINES - 1)}) == []


def heavy_after(statement: str, heavy: Sequence[str] = HEAVY) -> list[str]:
    """The heavy packages that a new interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint('LOADED', *sorted(set({heavy}) & set(sys.modules)))"
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1].split()[1:]


def test_import_is_light() -> None:
    assert heavy_after("import exactflow") == []


@pytest.mark.parametrize("words", [["info"], ["results"], ["results", "imagenet64"], ["--help"]])
def test_what_is_only_read_needs_no_torch(words: list[str]) -> None:
    said = f"import sys; sys.argv = {['exactflow', *words]}; from exactflow.cli import main"
    ending = "\ntry: main()\nexcept SystemExit as end: assert not end.code"
    assert heavy_after(said + ending, ["torch"]) == []


EVERY_NAME = "import exactflow; found = [getattr(exactflow, name) for name in exactflow.__all__]"


def test_public_names_are_light() -> None:
    assert heavy_after(f"{EVERY_NAME}; assert len(found) > 10") == []


def test_a_public_name_that_is_not_there_is_found() -> None:
    with pytest.raises(AssertionError, match="no attribute 'nothing'"):
        heavy_after(EVERY_NAME.replace(";", "; exactflow.__all__.insert(0, 'nothing');", 1))


def test_public_names_are_those_with_a_home() -> None:
    """Type checkers, `import *` and first use know the same public names."""
    import exactflow

    module = ast.parse((PACKAGE / "__init__.py").read_text())
    (checked,) = (node for node in module.body if isinstance(node, ast.If))
    imported = {
        alias.asname or alias.name
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(exactflow.__all__) == dir(exactflow) == sorted({*imported, "__version__"})
    assert set(exactflow.__all__) - set(exactflow._HOMES) == {"__version__", "registry", "solvers"}
    for name in exactflow.__all__:
        assert getattr(exactflow, name) is not None


def test_a_heavy_import_is_found() -> None:
    pytest.importorskip("sklearn")
    assert "sklearn" in heavy_after("import sklearn")
