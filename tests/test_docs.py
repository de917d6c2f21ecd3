"""Every code block of README.md and docs/ runs, and docs/ leaves out nothing that is public."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
import yaml

import flexlora_fast as ff
from flexlora_fast.lowrank.plan import SOLVERS
from tests import command, documented
from tests.documented import ROOT, Block

PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in documented.pages()]


def run(block: Block, names: dict[str, Any], page: Path) -> str:
    """What the block prints."""
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")  # tracebacks show the page's lines
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def commands(block: Block) -> list[list[str]]:
    """The words of each line that is a command; what stands in brackets is left away."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(re.sub(r"\[--.*?\]", "", line), comments=True))]


def obey(words: list[str]) -> None:
    """Run a command of this package; of any other, find out whether there is such a thing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    match words:
        case ["flexlora-fast", "doctor"]:  # what it finds is this machine's
            assert command.run("doctor", "--help").exit_code == 0
        case ["flexlora-fast", *arguments]:
            if arguments[:1] == ["simulate"] and "--compare" not in arguments:
                arguments += ["--workers", "0"]  # in this process; others take ten seconds to start
            expanded = [match for x in arguments for match in (sorted(map(str, Path().glob(x))) if "*" in x else [x])]
            result = command.run(*expanded)
            assert result.exit_code == 0, result.output
        case ["torchrun", *arguments]:
            given = torch.distributed.run.get_args_parser().parse_args(arguments)
            assert given.module and given.training_script == "flexlora_fast"
            name, *rest = given.training_script_args
            known = command.run(name, "--help").output  # tests/test_distributed*.py start it
            assert all(option in known for option in rest if option.startswith("--"))
        case ["make", *targets]:
            targets = [target for target in targets if "=" not in target]
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert targets and set(targets) <= set(known)
        case ["pip", "install", *arguments]:
            for extras in re.findall(r"\[(.*?)\]", " ".join(arguments)):
                assert set(extras.split(",")) <= set(project["optional-dependencies"])
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, module
        case _:
            pytest.fail(f"a command that nobody tests: {shlex.join(words)}")


@pytest.fixture
def no_group() -> Iterator[None]:
    """Ends what a page has begun with torch.distributed."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = documented.world(tmp_path)
    names["names"].update(names, monkeypatch=monkeypatch)
    names = names["names"]  # the one that functions of the world look names up in
    here = {"gpu": torch.cuda.is_available(), "nvflare": importlib.util.find_spec("nvflare") is not None}
    absent = {name for name, found in here.items() if not found}
    printed = ""
    for block in documented.blocks(page.read_text(encoding="utf-8")):
        language = block.language or ("sh" if page.name == "README.md" else "")
        for key, code in documented.BEFORE.get(page.name, {}).items():
            if key in block.code:
                exec(code, names)
        assert language in documented.LANGUAGES, f"{page}:{block.line}: nobody runs {block.language!r}"
        if block.marks & absent:
            compile(block.code, str(page), "exec")
        elif "output" in block.marks:
            assert block.code.rstrip() == printed.rstrip(), f"{page}:{block.line}: it printed\n{printed}"
        elif "raises" in block.marks:
            with pytest.raises(ff.errors.FlexLoRAError) as raised:
                run(block, names, page)
            message = str(raised.value).replace(str(tmp_path), "/srv")  # the pages' working folder
            assert message == block.heading.strip("`"), f"{page}:{block.line}"
        elif language == "sh":
            for words in commands(block):
                obey(words)
        elif language == "toml":
            Path(block.code.splitlines()[0].removeprefix("# ")).write_text(block.code, encoding="utf-8")
        elif language == "python":
            printed = run(block, names, page)


def test_no_block_is_passed_over() -> None:
    """A fence of another language, an output that differs and an error that does not come are found."""
    found = documented.blocks(
        "# A\n```python\nx = 1\n```\n<!-- raises -->\n```python\ny\n```\n<!-- setup\nz = 2\n-->\n"
    )
    assert [(block.language, block.code, block.line) for block in found] == [
        ("python", "x = 1", 3),
        ("python", "y", 7),
        ("python", "z = 2", 10),
    ]
    assert found[1].marks == {"raises"} and found[1].heading == "A"
    with pytest.raises(pytest.fail.Exception, match="nobody tests"):
        obey(["curl", "example.org"])
    with pytest.raises(AssertionError):
        obey(["make", "no-such-target"])


def text_of(*pages: str) -> str:
    return "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)


def test_every_public_name_has_its_place_in_the_reference() -> None:
    shown = set(re.findall(r"^::: flexlora_fast\.(\S+)", text_of("api.md"), re.M))
    assert set(ff.__all__) <= shown


def test_every_code_and_rule_is_explained() -> None:
    rows = re.findall(r"^\| `(.+?)` \|", text_of("trust.md"), re.M)
    assert {str(reason) for reason in ff.gate.Reason} <= set(rows)
    rows = re.findall(r"^\| `(.+?)`(?: \(.*?\))? \|", text_of("choosing.md"), re.M)
    assert {*ff.defence.RULES, *SOLVERS, *ff.methods.METHODS} <= set(rows)


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["strict"] is True
    listed = [name for entry in site["nav"] for name in entry.values()]
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in documented.pages()[1:])
