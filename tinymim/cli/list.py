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

    recipes = Path(tinymim.recipes.__file__).parent

    def summary(path: Path) -> str:
        text = path.read_text("utf-8-sig")
        lines = takewhile(lambda line: line.startswith("#"), text.split("\n"))
        words = " ".join(
            (ast.get_docstring(ast.parse(text)) or " ".join(lines).replace("#", "")).split("\n\n")[0].split()
        )
        return re.split(r"[.] (?=[A-Z])", words)[0].rstrip(".") + "."

    shown = args.what
    if shown is None:
        try:
            import torch  # noqa: F401
        except ImportError:  # a box for deployment
            print("models, teachers: not listed, torch is not installed here")
            shown = "light"
    if shown in (None, "models"):
        from tinymim.models import create_model, model_names
        from tinymim.models.backbone import PLAIN, backbone_names

        print("models (tinymim.create_model, --student):")
        for name in model_names():
            model = create_model(name)
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            print(
                f"  {name:24} width {model.embed_dim}, {model.num_heads} heads, {model.depth} blocks, {millions:.1f} M"
            )
        others = [name for name in backbone_names() if name not in (*model_names(), PLAIN)]
        print(f"segmentation backbones by timm's names (TinyMIMBackbone(name=...)): {', '.join(others)}")
    if shown in (None, "teachers"):
        from tinymim.models.teachers import SUGGESTED, describe_teacher

        print("teachers (--teacher), the block that is read by default, licence of the weights:")
        for name in SUGGESTED:
            t = describe_teacher(name)
            print(
                f"  {t.name:48} width {t.width:4}, {t.heads:2} heads, {t.blocks} blocks, patch {t.patch}, "
                f"block {t.target_block}, {t.licence}"
            )
    if shown in (None, "light", "recipes"):
        print("recipes (tinymim pretrain|distill|finetune --recipe):")
        for path in sorted(recipes.glob("[!_]*.py")):
            print(f"  {path.stem:32} {summary(path)}")
    if shown in (None, "light", "studies"):
        print("studies (tinymim study NAME --data FOLDER):")
        for path in sorted((recipes / "studies").glob("[!_]*.py")):
            print(f"  {path.stem:32} {summary(path)}")
    if shown in (None, "light", "configs"):
        print("segmentation configs (tinymim segment NAME --data-root FOLDER):")
        folder = Path(tinymim_mmseg_configs.__file__).parent
        for path in sorted(folder.glob("[!_]*.py")):
            print(f"  {path.stem:32} {summary(path)}")
    return 0
