"""What holds for the options of every command: given twice, or not readable."""

import pytest

from tinymim.cli import main, run_command


@pytest.mark.parametrize(
    ("words", "told", "why"),
    [
        (["distill", "--cfg-options", "betas=(1,2"], "--cfg-options betas=(1,2", "brackets do not match"),
        (["distill", "--cfg-options", "drop_path"], "--cfg-options drop_path", "KEY=VALUE"),
        (["segment", "x", "--cfg-options", "=3"], "--cfg-options =3", "KEY=VALUE"),
        (["distill", "--cfg-options", "hops=[dict(a=dict(b=1,c=2))]"], "--cfg-options hops", "key by key"),
    ],
)
def test_options_that_cannot_be_read(words, told, why, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert why in error


def test_the_last_value_holds_and_the_keys_of_two_cfg_options_add_up():
    from tinymim.cli.bench import add_arguments as bench
    from tinymim.cli.segment import add_arguments as segment

    got = []
    first = ["x", "--work-dir", "a", "--cfg-options", "a=1", "b=[1,2]"]
    words = [*first, "--work-dir", "c", "--cfg-options", "c=x", "a=2"]
    assert run_command("segment", "", segment, lambda args: got.append(args) or 0, words) == 0
    assert got[0].work_dir == "c"
    assert got[0].cfg_options == {"a": 2, "b": [1, 2], "c": "x"}
    words = ["a.onnx", "b.onnx", "--precision", "f32", "--precision", "bf16"]
    assert run_command("bench", "", bench, lambda args: got.append(args) or 0, words) == 0
    assert got[1].precision == ["f32", "bf16"]
    assert got[1].files == ["a.onnx", "b.onnx"]
