"""Pages of the documentation that are made from the code: every command from its own parser; the tutorial's notebook.

MkDocs calls these functions (``hooks`` of mkdocs.yml).
"""

import argparse
import html
import importlib
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    from tinymim.cli import VERBS

    lines = ["# Commands", "", "| command | what it does |", "|---|---|"]
    for verb, text in {**VERBS, "tinymim-export": "a segmentor or backbone to a verified .onnx file"}.items():
        name, page = (verb, verb) if verb.startswith("tinymim") else (f"tinymim {verb}", verb)
        lines.append(f"| [`{name}`]({page}.md) | {text} |")
        files.append(File.generated(config, f"commands/{page}.md", content=command_page(name, text)))
    files.append(File.generated(config, "commands/index.md", content="\n".join(lines) + "\n"))
    files.append(File.generated(config, "start/tutorial.md", content=notebook_page(NOTEBOOK)))
    return files


def on_page_content(text: str, **more: Any) -> str:
    """Names that docstrings mark for Sphinx become plain code."""
    return re.sub(r":?\b(?:func|class|data|meth|mod|attr):\s*<code>~?", "<code>", text)


def command_page(name: str, text: str) -> str:
    """A command by its own parser: every option with its words."""
    room = "tinymim_export.cli" if name == "tinymim-export" else f"tinymim.cli.{name.split()[1]}"
    parser = argparse.ArgumentParser(prog=name, formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False)
    importlib.import_module(room).add_arguments(parser)
    formatter = parser._get_formatter()
    places = " ".join(formatter._format_args(a, a.dest) for a in parser._actions if not a.option_strings)
    lines = [
        f"# {name}",
        "",
        f"{text[0].upper()}{text[1:]}.",
        "",
        f"```bash\n{name} [options] {places}".rstrip(),
        "```",
    ]
    for group in parser._action_groups:
        if actions := [a for a in group._group_actions if a.help != argparse.SUPPRESS]:
            title = group.title or "options"
            lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
            if group.description:
                lines += [group.description, ""]
            for action in actions:
                words = formatter._format_action_invocation(action)
                said = formatter._expand_help(action).removesuffix(" (default: None)") if action.help else ""
                lines.append(f"- `{words}` " + (f"&mdash; {html.escape(said, quote=False)}" if said else ""))
    return "\n".join([*lines, ""])


def notebook_page(path: Path) -> str:
    """A notebook's text and code, in order."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    place = path.relative_to(ROOT).as_posix()
    return "\n\n".join([*parts, f"This page is the notebook `{place}`, which the tests run.", ""])
