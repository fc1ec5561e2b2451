"""``tinymim card``: a run as a folder for the Hugging Face hub: model card, safetensors, config.json, .onnx files."""

import argparse
import contextlib
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from tinymim.errors import CheckpointError, ConfigError
from tinymim.hub import CONFIG, WEIGHTS, check_repository, push
from tinymim.schema import read_json

NEXT = {  # what reads a folder of each role
    "teacher": "tinymim distill --teacher {} --data PHOTOS",
    "classifier": "tinymim eval {} --data VAL",
    "segmentor": "tinymim segment --test {} --data-root FOLDER",
    "tracker": "tinymim track --test {} --data SEQUENCES",
    "detector": "tinymim detect --test {} --data OBJECTS --annotations OBJECTS.json",
}
PREPROCESSING = {"input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"}
PREPROCESSING |= {"num_classes", "pool_size", "first_conv", "classifier", "custom_load"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("run", metavar="RUN", help="run folder of any verb, or one of its files (best_segmentor.pth)")
    parser.add_argument(
        "more",
        nargs="*",
        metavar="PATH",
        help="where else its .onnx files, scores and times lie",
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder to write; default: RUN-card")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    parser.add_argument("--license", metavar="NAME", help="the hub's word, e.g. apache-2.0; default: unknown")
    parser.add_argument("--datasets", nargs="+", default=(), metavar="NAME", help="data sets, as the hub calls them")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder there; a new repository is private")


def run(args: argparse.Namespace) -> int:
    """Write the folder, say what is in it, push it if asked to."""
    from tinymim.cli._next import segment_line
    from tinymim.files import atomic_folder, sha256_file, write_json
    from tinymim_export.report.artifacts import read_paths, weights_file
    from tinymim_export.report.card import Card, belonging
    from tinymim_export.report.page import hide_paths
    from tinymim_export.report.tensor_shapes import read_weights

    if args.push:
        check_repository(args.push)
    source = _weights(Path(args.run))
    folder = source.parent if source.parent.name not in ("", "..") else source.parent.resolve()
    out = Path(args.out) if args.out else folder.with_name(f"{folder.name}-card")
    _check_out(out, source, args.overwrite)
    lineage = read_paths([source.parent, *map(Path, args.more)])
    found = weights_file(source)
    file = lineage.file(found.sha256) or found
    file.path = str(source)
    onnx, left_out = belonging(lineage, file.sha256)
    meta = read_weights(source)[1] | {"source_sha256": file.sha256}
    for key in ("config", "cfg"):  # a segmentor's: its text may travel, a home folder should not
        if isinstance(meta.get(key), str):
            meta[key] = hide_paths(meta[key])
    name = args.push.partition("/")[2] if args.push else out.resolve().name
    next_line = segment_line(source, f"hf-hub:OWNER/{name}") if file.role == "student" else None
    with atomic_folder(out, replace=args.overwrite) as part:
        _write_weights(source, part / WEIGHTS, meta)
        config, why = _timm_form(part, meta, file.role)
        if why:
            write_json(part / CONFIG, {"tinymim": meta})
        for one in onnx:
            shutil.copyfile(str(one.path), part / Path(str(one.path)).name)
        sha, timm = sha256_file(part / WEIGHTS), config.get("architecture")
        card = Card(name, file, lineage, meta, sha, timm, onnx, args.license, args.datasets, next_line)
        (part / "README.md").write_text(card.markdown(), "utf-8", "backslashreplace")
    print(f"{out}: README.md, {CONFIG}, {', '.join([WEIGHTS, *(Path(str(one.path)).name for one in onnx)])}")
    loaded = f"timm.create_model({'local-dir:' + str(out)!r}, pretrained=True)"
    print(f"timm:    {f'no: {why}' if why else loaded}")
    for name in left_out:
        print(f"note: left out: {name}: it does not come from {source.name}")
    if not args.license:
        print("note: no licence is stated; --license NAME states one")
    if args.push:
        print(f"pushed:  {push(out, args.push)}")
    words = shlex.quote(str(out))
    if file.role == "student":
        print(f"next:    {segment_line(out)}")
    else:
        print(f"next:    {NEXT[file.role].format(words)}")
    return 0


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse a folder that holds the run, and to replace one that is no card.

    Raises:
        ConfigError: it is one of these.
    """
    if source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--out {out} holds the run itself", "a card has a folder of its own", "choose another --out")
    card = all((out / name).is_file() for name in (WEIGHTS, CONFIG, "README.md"))
    if overwrite and out.is_dir() and any(out.iterdir()) and not card:
        raise ConfigError(f"{out} is no card", "what is in it would be lost", "choose another --out")


def _weights(path: Path) -> Path:
    """The file of weights of a run folder, or the file itself.

    Raises:
        CheckpointError: there is none.
    """
    from tinymim_export.report.artifacts import WEIGHTS as NAMES

    if path.is_file() and path.suffix in (".pth", ".safetensors"):
        return path
    if found := next((path / name for name in NAMES if (path / name).is_file()), None):
        return found
    below = sorted({p.parent for name in NAMES for p in path.glob(f"*/{name}")}) if path.is_dir() else []
    why = f"none of {', '.join(NAMES)} is in it" if path.is_dir() else "there is no such run folder"
    fix = f"did you mean tinymim card {shlex.quote(str(below[0]))}?" if below else "give the folder of a finished run"
    raise CheckpointError(f"no model in {path}", why, fix)


def _write_weights(source: Path, path: Path, meta: dict[str, Any]) -> None:
    """The tensors of a file of ours as .safetensors, its description in the header; read back and compared.

    Raises:
        CheckpointError: the file describes nothing, or what was written is not what was read.
    """
    import torch
    from safetensors.torch import save

    from tinymim.models.weight_files import open_described

    state, known = open_described(source)
    if not state or not known:
        raise CheckpointError(f"{source} describes no model", "it has no tensors or no meta", "give a file of ours")
    header = {"tinymim": json.dumps(meta), "format": "pt"}
    path.write_bytes(save({key: value.clone().contiguous() for key, value in state.items()}, metadata=header))
    again, said = open_described(path)
    same = state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)
    if not same or said.keys() != meta.keys():
        raise CheckpointError(f"{path.name} is not what was read", "the disk or a library failed", "try another disk")


def _timm_form(folder: Path, meta: dict[str, Any], role: str) -> tuple[dict[str, Any], str]:
    """Write config.json as timm reads it, and load the folder with timm as a user would.

    Returns:
        What config.json says, and an empty text; or {} and why timm cannot load it.
    """
    import timm
    import torch
    from timm.models._hub import save_config_for_hf

    from tinymim.files import write_json
    from tinymim.models.checkpoints import model_from_checkpoint
    from tinymim.models.classifier import load_classifier
    from tinymim.models.timm_entries import timm_form

    if role not in ("student", "teacher", "classifier"):
        return {}, f"it has no {role} of ours"
    try:
        named, arguments = timm_form(meta["config"])
    except ConfigError as error:
        return {}, error.why
    classes, size = [*(meta.get("classes") or ())] if role == "classifier" else [], arguments.get("img_size", 224)
    sides = [size, size] if isinstance(size, int) else [*size]
    about: dict[str, Any] = {"mean": meta["mean"], "std": meta["std"], "input_size": [3, *sides], "crop_pct": 1.0}
    arguments |= {"global_pool": "avg"} if classes else {}
    try:
        bare = timm.create_model(named, num_classes=len(classes), **arguments)
        more = {"tinymim": meta, "pretrained_cfg": about, **({"label_names": classes} if classes else {})}
        save_config_for_hf(bare, str(folder / CONFIG), more, model_args=arguments)
        config = read_json(folder / CONFIG, dict[str, Any])
        known = config["pretrained_cfg"]  # of the weights that timm has under this name: only what is true of these
        config["pretrained_cfg"] = {key: value for key, value in known.items() if key in PREPROCESSING}
        write_json(folder / CONFIG, config)
        theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        image = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            if classes:
                with contextlib.redirect_stdout(io.StringIO()):
                    wanted, got = load_classifier(folder)[0](image), theirs(image)
            else:
                ours = model_from_checkpoint(folder, say=False)[0]
                wanted, got = (
                    model.forward_intermediates(image, indices=1, intermediates_only=True)[-1]
                    for model in (ours, theirs)
                )
        if not torch.allclose(wanted, got, atol=1e-4, rtol=1e-3):
            return {}, f"timm's {named} computes something else from these tensors"
    except Exception as error:  # timm refuses in many ways
        return {}, f"{type(error).__name__}: {(str(error) or named).splitlines()[0][:160]}"
    return config, ""
