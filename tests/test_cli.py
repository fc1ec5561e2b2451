"""What holds for the options of every command: given twice, or not readable."""

import pytest

from tinymim.cli import main, run_command


@pytest.mark.parametrize(
    ("words", "told", "why"),
    [
        (["pretrain", "--epochs", "1", "--epochs", "2"], "--epochs is given twice: 1.0, and 2.0", "one value"),
        (["distill", "--teacher", "a", "--teacher", "b"], "--teacher is given twice: a, and b", "names all of them"),
        (["segment", "x", "--work-dir", "a", "--work-dir", "b"], "--work-dir is given twice: a, and b", "one value"),
        (["eval", "x.onnx", "--mean", "1", "2", "3", "--mean", "1", "2", "4"], "--mean is given twice", "names all"),
        (["finetune", "--cfg-options", "a=1", "--cfg-options", "a=2"], "--cfg-options: a is 1 and 2", "given twice"),
        (["segment", "x", "--cfg-options", "a=1", "b=3", "a=2"], "--cfg-options: a is 1 and 2", "given twice"),
        (["distill", "--cfg-options", "betas=(1,2"], "--cfg-options betas=(1,2 cannot be read", "KEY=VALUE"),
        (["distill", "--cfg-options", "drop_path"], "--cfg-options drop_path cannot be read", "KEY=VALUE"),
        (["distill", "--cfg-options", "hops=[dict(a=dict(b=1,c=2))]"], "cannot be read", "recipe file"),
    ],
)
def test_options_that_contradict_or_cannot_be_read(words, told, why, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert why in error


def test_options_given_twice_that_agree():
    """Equal values are one, the keys of two --cfg-options add up, options that collect and positional words repeat."""
    from tinymim.cli.bench import add_arguments as bench
    from tinymim.cli.segment import add_arguments as segment

    got = []
    words = [
        "x",
        "--work-dir",
        "a",
        "--cfg-options",
        "a=1",
        "b=[1,2]",
        "--work-dir",
        "a",
        "--cfg-options",
        "c=x",
        "a=1",
    ]
    assert run_command("segment", "", segment, lambda args: got.append(args) or 0, words) == 0
    assert got[0].work_dir == "a"
    assert got[0].cfg_options == {"a": 1, "b": [1, 2], "c": "x"}
    words = ["a.onnx", "b.onnx", "--precision", "f32", "--precision", "bf16"]
    assert run_command("bench", "", bench, lambda args: got.append(args) or 0, words) == 0
    assert got[1].precision == ["f32", "bf16"]
    assert got[1].files == ["a.onnx", "b.onnx"]
