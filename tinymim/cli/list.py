"""``tinymim list``: models, teachers, recipes, studies and segmentation configs."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=("models", "teachers", "recipes", "studies", "configs"),
        help="default: all of these",
    )


def run(args: argparse.Namespace) -> int:
    """Print one line per name, with the first sentence of its description."""
    import ast
    import re
    from itertools import takewhile
    from pathlib import Path

    import tinymim_mmseg_configs

    import tinymim.recipes
    from tinymim.cli._listed import BACKBONES, MODELS, TEACHERS

    recipes = Path(tinymim.recipes.__file__).parent

    def summary(path: Path) -> str:
        text = path.read_text("utf-8-sig")
        lines = takewhile(lambda line: line.startswith("#"), text.split("\n"))
        words = " ".join(
            (ast.get_docstring(ast.parse(text)) or " ".join(lines).replace("#", "")).split("\n\n")[0].split()
        )
        return re.split(r"[.] (?=[A-Z])", words)[0].rstrip(".") + "."

    if args.what in (None, "models"):
        print("models (tinymim.create_model, --student):")
        for m in MODELS:
            print(f"  {m.name:24} width {m.width}, {m.heads} heads, {m.blocks} blocks, {m.millions:.1f} M")
        print(f"backbones by timm's names (finetune --model, TinyMIMBackbone(name=...)): {', '.join(BACKBONES)}")
    if args.what in (None, "teachers"):
        print("teachers (--teacher), the block that is read by default, licence of the weights:")
        for t in TEACHERS:
            print(
                f"  {f'timm/{t.name}':48} width {t.width:4}, {t.heads:2} heads, {t.blocks} blocks, patch {t.patch}, "
                f"block {t.target_block}, {t.licence}"
            )
    if args.what in (None, "recipes"):
        print("recipes (tinymim pretrain|distill|finetune|track --recipe):")
        for path in sorted(recipes.glob("[!_]*.py")):
            print(f"  {path.stem:32} {summary(path)}")
    if args.what in (None, "studies"):
        print("studies (tinymim study NAME --data FOLDER):")
        for path in sorted((recipes / "studies").glob("[!_]*.py")):
            print(f"  {path.stem:32} {summary(path)}")
    if args.what in (None, "configs"):
        print("segmentation configs (tinymim segment NAME --data-root FOLDER):")
        folder = Path(tinymim_mmseg_configs.__file__).parent
        for path in sorted(folder.glob("[!_]*.py")):
            print(f"  {path.stem:32} {summary(path)}")
    return 0
