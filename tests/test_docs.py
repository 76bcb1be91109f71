"""README and docs are true: links, commands and their options, make targets, modules, paths, figures, the order of the tour.

Each check is a function from a document to its problems; the planted documents show that it finds them.
"""

from __future__ import annotations

import ast
import re
import shlex
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from benchmarks.recording import recorded
from docs import generate
from orchestrator.base.errors import SpecError
from orchestrator.base.extras import EXTRAS
from orchestrator.cli.commands import app
from orchestrator.families import FAMILIES
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "deploy/README.md", *sorted(DOCS.glob("*.md"))]
COMMANDS: Any = typer.main.get_command(app)
MAX_LINES, MAX_COLUMNS = 120, 110
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_OWN_FOLDERS = ("orchestrator", "actors", "tests", "docs", "benchmarks", "deploy", "cluster_configs", ".ci")


def prose(text: str) -> str:
    """The document without its fenced blocks."""
    return _FENCE.sub("", text)


def code(text: str) -> Iterator[str]:
    """Every line of code: fenced, indented, inline; comments and what a pipe leads to are cut off."""
    for language, block in _FENCE.findall(text):
        if language != "diff":
            yield from block.splitlines()
    outside = prose(text)
    yield from (line.strip() for line in outside.splitlines() if line.startswith("    "))
    yield from _INLINE.findall("\n".join(line for line in outside.splitlines() if not line.startswith("    ")))


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> Iterator[str]:
    for target in _LINK.findall(prose(text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = path.parent / name if name else path
        if not found.exists():
            yield f"link to {target}"
        elif anchor and anchor not in anchors(found):
            yield f"anchor of {target}"


def wrong_commands(path: Path, text: str) -> Iterator[str]:
    for line in code(text):
        match = re.match(r"(?:orchestrator|.*-m orchestrator\.cli)( .+)", line)
        if match:
            words = shlex.split(match.group(1).split(" | ")[0].replace("\\|", "|"), comments=True)
            yield from (f"{line}: {problem}" for problem in _command_problems([word for word in words if word != "..."]))


def _command_problems(words: list[str]) -> Iterator[str]:
    command = COMMANDS
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in command.commands:
            yield f"no command {name}"
            return
        command = command.commands[name]
    options = {name: param for param in command.params for name in (*param.opts, *param.secondary_opts) if name.startswith("-")}
    room = sum(param.param_type_name == "argument" for param in command.params)
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            room -= 1
            continue
        name, _, _ = word.partition("=")
        if name in ("-v", "--verbose", "-h", "--help"):
            continue
        param = options.get(name)
        if param is None:
            yield f"no option {name}"
        elif not param.is_flag:
            value = words.pop(0) if words else ""
            annotation = param.type_descriptor.annotation
            choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
            if choices and value not in choices:
                yield f"{name} is none of {', '.join(choices)}"
    if room < 0:
        yield "too many words"


def missing_targets(path: Path, text: str) -> Iterator[str]:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(text):
        match = re.match(r"(?:\w+=\S+ )*make ([\w-]+)", line)
        if match and match.group(1) not in targets:
            yield f"make {match.group(1)}"


def missing_modules(path: Path, text: str) -> Iterator[str]:
    """Modules of ours that are run with -m, and the options that they are given."""
    for line in code(text):
        for module, rest in re.findall(r"python -m ((?:benchmarks|docs|tests)\.[\w.]+)([^#|]*)", line):
            file = ROOT / (module.replace(".", "/") + ".py")
            if not file.is_file():
                yield f"module {module}"
                continue
            source = file.read_text()
            yield from (f"{module} {option}" for option in re.findall(r"(--[\w-]+)", rest) if f'"{option}"' not in source)


def missing_paths(path: Path, text: str) -> Iterator[str]:
    pattern = re.compile(rf"(?:^|[ `'\"])((?:{'|'.join(map(re.escape, _OWN_FOLDERS))})/[\w./-]+)")
    for line in code(text):
        for name in pattern.findall(line):
            if not (ROOT / name).exists() and not (path.parent / name).exists():
                yield f"path {name}"


def lonely_figures(path: Path, text: str) -> Iterator[str]:
    """Sections with figures that do not begin with a command that prints them."""
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        command = re.match(r"\s*`python -m (benchmarks\.\w+)", body)
        if re.search(r"\d", body) and (command is None or not (ROOT / f"{command.group(1).replace('.', '/')}.py").is_file()):
            yield f"figures of {title}"


def untrue_steps(path: Path, text: str) -> Iterator[str]:
    """Steps of the tour that are out of order: a file must exist, define what the text says, and be named by one before it."""
    steps = re.findall(r"^(\d+)\. \[(\S+)\]\((\S+)\): (.+)$", text, re.MULTILINE)
    if len(steps) < 20:
        yield "the tour has fewer than 20 steps"
    before: list[Path] = []
    for place, (number, name, target, words) in enumerate(steps, 1):
        file = ROOT / name
        if int(number) != place:
            yield f"step {number} is the {place}th"
        if not file.is_file() or (path.parent / target).resolve() != file:
            yield f"step {number}: no file {name}"
            continue
        source = file.read_text()
        named = re.search(r"`(\w+)`", words)
        if named is None or not re.search(rf"^\s*(?:def|class) {named.group(1)}\b|^{named.group(1)}\b.*=", source, re.MULTILINE):
            yield f"step {number}: {name} does not define what it is named for"
        if before and not _is_named(file, before):
            yield f"step {number}: no file before it names {name}"
        before.append(file)


def _is_named(file: Path, before: list[Path]) -> bool:
    """Whether a file before it imports this one, at once or in a table, or imports its package, which does."""
    parents = [package / "__init__.py" for package in file.relative_to(ROOT).parents if package != Path()]
    packages = [ROOT / name for name in parents if (ROOT / name) != file and (ROOT / name).is_file()]
    texts = [other.read_text() for other in before]
    texts += [package.read_text() for package in packages if any(_mentions(text, package) for text in texts)]
    return any(_mentions(text, file) for text in texts)


def _mentions(text: str, file: Path) -> bool:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    dotted = re.escape(".".join(parts))
    imported = rf"from {re.escape('.'.join(parts[:-1]))} import [^\n]*\b{parts[-1]}\b"
    return bool(re.search(rf"{dotted}(?![\w.])|{dotted}:\w|{imported}", text))


def large_page(path: Path, text: str) -> Iterator[str]:
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        yield f"{len(lines)} lines"
    yield from (f"line {number} has {len(line)} columns" for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS)


def untrue_diffs(path: Path, text: str) -> Iterator[str]:
    """Added lines of a worked diff that the repository does not have, in this order."""
    for language, block in _FENCE.findall(text):
        if language != "diff":
            continue
        (name,) = re.findall(r"^\+\+\+ (\S+)$", block, re.MULTILINE)
        lines = iter((ROOT / name).read_text().splitlines())
        for added in re.findall(r"^\+(?!\+\+)(.*)$", block, re.MULTILINE):
            if not any(line == added for line in lines):
                yield f"{name} has no line {added!r}"


def wrong_examples(path: Path, text: str) -> Iterator[str]:
    """Specs that do not decode, and Python whose imports do not exist."""
    for language, block in _FENCE.findall(text):
        if language == "yaml" and re.search(r"^(source|quantization):", block, re.MULTILINE):
            try:
                decode(
                    BuildSpec, {"source": {"path": "x"}, "release": {"name": "x", "version": "1"}} | yaml.safe_load(block), "page"
                )
            except SpecError as error:
                yield f"spec: {error.message}"
        elif language == "python":
            imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
            for node in imports:
                try:
                    exec(ast.unparse(node), {})
                except ImportError as error:
                    if (error.name or "").partition(".")[0] not in EXTRAS["gpu"]:  # not in dev
                        yield f"python: {error}"


Check = Callable[[Path, str], Iterator[str]]
EVERYWHERE: tuple[Check, ...] = (
    broken_links,
    wrong_commands,
    missing_targets,
    missing_modules,
    missing_paths,
    untrue_diffs,
    wrong_examples,
)
SOMEWHERE: tuple[tuple[str, Check], ...] = (
    ("README.md", large_page),
    ("docs/benchmarks.md", lonely_figures),
    ("docs/tour.md", untrue_steps),
)
_TOUR = "".join(re.findall(r"^\d+\. .+\n", (DOCS / "tour.md").read_text(), re.MULTILINE))  # planted documents change one step of it


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_links_commands_targets_modules_and_paths_exist(path: Path) -> None:
    text = path.read_text()
    assert [problem for check in EVERYWHERE for problem in check(path, text)] == []


@pytest.mark.parametrize(("name", "check"), SOMEWHERE, ids=[name for name, _ in SOMEWHERE])
def test_page_keeps_its_own_promise(name: str, check: Check) -> None:
    assert list(check(ROOT / name, (ROOT / name).read_text())) == []


@pytest.mark.parametrize(
    ("check", "text", "expected"),
    [
        (broken_links, "[a](nowhere.md)", "link to nowhere.md"),
        (broken_links, "[a](tour.md#nothing)", "anchor of tour.md#nothing"),
        (wrong_commands, "`orchestrator buld SPEC`", "no command buld"),
        (wrong_commands, "    orchestrator k8s nothing", "no command nothing"),
        (wrong_commands, "```\norchestrator build SPEC --stroe X  # comment\n```", "no option --stroe"),
        (wrong_commands, "`orchestrator --no-such`", "no option --no-such"),
        (wrong_commands, "`orchestrator build-engine --checkpoint A --output B --backend onnx`", "--backend is none of"),
        (wrong_commands, "`orchestrator verify URL OTHER`", "too many words"),
        (wrong_commands, "`python -m orchestrator.cli biuld X`", "no command biuld"),
        (missing_targets, "`make nothing`", "make nothing"),
        (missing_modules, "`python -m benchmarks.nothing`", "module benchmarks.nothing"),
        (missing_modules, "`python -m benchmarks.miniature --no-such`", "benchmarks.miniature --no-such"),
        (missing_paths, "`orchestrator/nothing.py`", "path orchestrator/nothing.py"),
        (missing_paths, "`orchestrator plan cluster_configs/nothing.yaml`", "path cluster_configs/nothing.yaml"),
        (lonely_figures, "## A\n\n5 s\n", "figures of A"),
        (lonely_figures, "## A\n\n`python -m benchmarks.nothing`: 5 s\n", "figures of A"),
        (large_page, "x\n" * (MAX_LINES + 1), "lines"),
        (large_page, "x" * (MAX_COLUMNS + 1), "columns"),
        (untrue_steps, _TOUR.replace("12. ", "13. ", 1), "step 13 is the 12th"),
        (untrue_steps, _TOUR.replace("work/convert/step.py", "work/convert/stop.py"), "no file"),
        (untrue_steps, _TOUR.replace("`make_plan`", "`no_such_function`"), "does not define"),
        (untrue_steps, "".join(reversed(_TOUR.splitlines(keepends=True))), "no file before it names"),
        (wrong_examples, "```yaml\nsource: {path: x}\nengine: {max_batch: 1}\n```", "spec: "),
        (wrong_examples, "```python\nfrom orchestrator import no_such_name\n```", "python: "),
        (untrue_diffs, "```diff\n+++ Makefile\n+nothing\n```", "Makefile has no line 'nothing'"),
    ],
)
def test_planted_wrong_page_is_found(check: Check, text: str, expected: str) -> None:
    found = list(check(DOCS / "planted.md", text))
    assert any(expected in problem for problem in found), found


def test_pages_hold_what_the_checks_look_for() -> None:
    """A check that finds nothing to look at would pass on anything."""
    lines = [line for path in PAGES for line in code(path.read_text())]
    assert sum(line.startswith("orchestrator ") for line in lines) > 60
    assert sum("make " in line for line in lines) > 10
    assert sum("python -m benchmarks." in line for line in lines) > 20
    assert sum(len(_LINK.findall(prose(path.read_text()))) for path in PAGES) > 80


def test_every_command_is_in_the_docs() -> None:
    lines = "\n".join(line for path in PAGES for line in code(path.read_text()))
    names = [" ".join(words) for words in _leaves(COMMANDS)]
    assert [name for name in names if not re.search(rf"orchestrator {name}\b", lines)] == []


def _leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from _leaves(below, (*words, name))
    else:
        yield words


def test_every_page_is_reached_from_the_readme() -> None:
    seen, pending = set(), [ROOT / "README.md"]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        links = (path.parent / target.partition("#")[0] for target in _LINK.findall(path.read_text()) if "://" not in target)
        pending.extend(link.resolve() for link in links if link.suffix == ".md")
    assert set(PAGES) <= seen


def test_generated_pages_are_fresh() -> None:
    stale = [path.name for path, text in generate.pages().items() if path.read_text() != text]
    assert stale == [], "run `make docs`"


def test_spec_page_has_every_field_with_its_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| *([^|]*) *\|$", (DOCS / "spec.md").read_text(), re.MULTILINE)
    assert len(rows) > 80
    assert [name for name, meaning in rows if not meaning.strip()] == []


def test_table_of_models_names_every_architecture() -> None:
    known = {name for family in FAMILIES.values() for name in family.architectures}
    rows = "\n".join(line for line in (DOCS / "models.md").read_text().splitlines() if line.startswith("| "))
    assert set(re.findall(r"`(\w+ForCausalLM)`", rows)) == known


def test_table_of_models_holds_measured_results_of_every_family() -> None:
    """`python -m benchmarks.families --engines --record --only FAMILY` and `python -m benchmarks.portable` write them."""
    known = recorded()
    wanted = {"errors", "engines", "formats", "portable"}
    assert {name: sorted(wanted - known.get(name, {}).keys()) for name in FAMILIES if wanted - known.get(name, {}).keys()} == {}
    errors = [float(cell) for facts in known.values() for cell in facts["errors"].values() if cell != "-"]
    assert max(errors) < 5e-5
    assert all(facts["engines"] == "4 built" for facts in known.values())
