"""What the command line refuses: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowra.compiler.errors import BudgetError
from lowra.runtime.manifest import manifest_checksum
from tests.cli.conftest import QUICK

REPO = Path(__file__).parent.parent.parent


pytestmark = pytest.mark.usefixtures("no_graph")


@pytest.fixture
def refused(lowra, tmp_path):
    """Runs a command that must fail with `code` and one line that says `words`, leaving nothing."""

    def check(code, words, *command):
        before = sorted(tmp_path.rglob("*"))
        done = lowra(*command)
        assert done.exit_code == code, done.output
        assert done.stdout == ""
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert words in last
        assert "Traceback" not in done.stderr
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def test_an_output_folder_that_holds_something(refused, dense, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    words = ("compile", "/nowhere", tmp_path, "--bits", 2)  # refused before the model is looked at
    refused(7, "exists and is not empty", *words)
    refused(7, "no lowra checkpoint", *words, "--overwrite")
    refused(7, "is a file", "compile", dense, tmp_path / "keep.txt", "--bits", 2)


def test_an_output_folder_that_cannot_be_made(refused, dense, tmp_path):
    (tmp_path / "file").touch()
    refused(7, "cannot use", "compile", dense, tmp_path / "file" / "out", "--bits", 2)


@pytest.mark.parametrize(
    ("bits", "words"), [("0.5", "can be stored in 1."), ("-1", "not a positive")]
)
def test_a_budget_out_of_reach(refused, dense, tmp_path, bits, words):
    refused(2, words, "compile", dense, tmp_path / "new" / "out", "--bits", bits)
    refused(2, words, "plan", dense, "--bits", bits)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("plan", "m", "--bits", "two"), "--bits"),
        (("plan", "m"), "--bits"),
        (("plan", "m", "--bits", "2", "--preset", "best"), "best"),
        (("plan", "m", "--bits", "2", "--pin", "q_proj"), "PATTERN=WIDTH"),
        (("plan", "m", "--bits", "2", "--widths", "1;2"), "list of widths"),
        (("inspekt", "m"), "inspekt"),
        (("eval", "m", "--windows", "0"), "--windows"),
    ],
)
def test_options_that_cannot_be_read(lowra, command, words):
    done = lowra(*command)
    assert done.exit_code == 2
    assert words in done.stderr
    failure = lowra.json(*command, code=2)
    assert words in failure["error"]
    assert failure["kind"] == "UsageError"


def test_a_pattern_that_matches_nothing_names_the_nearest(refused, dense, checkpoint, tmp_path):
    out = tmp_path / "out"
    near = "nearest: model.layers.0.self_attn."
    pin = "model.layers.0.self_attn.q_prj"
    refused(2, near, "compile", dense, out, "--bits", 3, "--pin", f"{pin}=4")
    refused(2, near, "plan", dense, "--bits", 3, "--ignore", pin)
    refused(2, near, "inspect", checkpoint, "--site", pin)


def test_a_gpu_that_is_unknown_names_those_there_are(refused, checkpoint):
    refused(2, "sm90", "inspect", checkpoint, "--kernels", "--target", "sm9")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there(refused, checkpoint, device):
    for command in (["eval", checkpoint], ["generate", checkpoint, "The"]):
        refused(1, f"device '{device}'", *command, "--device", device)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_cannot_do_a_compile_s_work(refused, tmp_path, device):
    words = ("compile", "/nowhere", tmp_path / "out", "--bits", 2)  # before the model is looked at
    refused(2, f"device='{device}'", *words, "--device", device)
    refused(2, f"device='{device}'", "plan", "m", "--bits", 2, "--measure", "--device", device)


@pytest.mark.parametrize("option", ["--device", "--work-dir", "--calibration"])
def test_options_of_a_measured_plan_want_it_measured(lowra, option):
    result = lowra("plan", "m", "--bits", 2, option, "cpu")
    assert result.exit_code == 2 and f"'{option}'" in result.stderr


def test_a_width_that_does_not_exist(refused):
    refused(2, "width 5", "plan", "m", "--bits", 2, "--pin", "*=5")


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-model-anywhere", "none.gguf"])
def test_a_model_that_is_not_there(refused, tmp_path, name):
    refused(8, name, "compile", name, tmp_path / "out", "--bits", 2)


def test_weights_that_are_not_finite(refused, dense, tmp_path):
    folder = Path(shutil.copytree(dense, tmp_path / "nan"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = "model.layers.1.mlp.up_proj: weight[3, 5] is nan"
    refused(3, words, "compile", folder, tmp_path / "out", "--bits", 3)


def test_calibration_that_is_empty_missing_or_not_wanted(refused, dense, tmp_path):
    empty, out = tmp_path / "empty.txt", tmp_path / "out"
    empty.touch()
    words = ("compile", dense, out, "--bits", 3, "--calibration")
    refused(4, "0 tokens", *words, empty)
    refused(4, "cannot read", *words, tmp_path / "none.txt")
    refused(4, "data-free", *words, empty, "--preset", "lowra")


def test_a_model_without_a_tokenizer(refused, dense, tmp_path):
    folder = Path(shutil.copytree(dense, tmp_path / "bare"))
    for file in folder.glob("token*"):
        file.unlink()
    text = tmp_path / "text.txt"
    text.write_text("some text")
    refused(8, "no tokenizer", "eval", folder, "--context", 32)
    refused(8, "no tokenizer", "generate", folder, "Hi")
    refused(8, "no tok", "compile", folder, tmp_path / "o", "--bits", 3, "--calibration", text)


def test_evaluation_that_cannot_be(refused, dense, tmp_path):
    refused(1, "128 positions", "eval", dense, "--context", 129)
    refused(1, "did not compile", "eval", dense, "--context", 32, "--no-adapters")
    refused(4, "cannot read", "eval", dense, "--text", tmp_path / "none.txt")
    refused(1, "no tokens", "generate", dense, "")


def test_a_checkpoint_is_not_compiled_twice(refused, checkpoint, tmp_path):
    refused(2, "compiled already", "compile", checkpoint, tmp_path / "out", "--bits", 2)


def test_a_flipped_bit_in_a_checkpoint(refused, broken, tmp_path):
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    refused(6, "differs from its checksum", "eval", broken, "--context", 32)
    refused(6, "differs from its checksum", "inspect", broken, "--graph")
    refused(6, "differs from its checksum", "export", broken, tmp_path / "out.pt2")


def test_another_format_version(refused, broken):
    manifest = json.loads((broken / "lowra.json").read_text())
    (broken / "lowra.json").write_text(json.dumps(manifest | {"format_version": 99}))
    refused(6, "format version 99", "inspect", broken)
    refused(6, "format version 99", "generate", broken, "Hi")


def test_a_manifest_without_its_tables(refused, broken, dense):
    manifest = json.loads((broken / "lowra.json").read_text())
    for report in ({}, manifest["report"] | {"skipped": [5]}):
        edited = manifest | {"report": report}
        edited["checksum"] = manifest_checksum(edited)
        (broken / "lowra.json").write_text(json.dumps(edited))
        refused(6, "broken report", "inspect", broken)
    (broken / "lowra.json").write_text('{"format_version": 2}')
    refused(6, "write the checkpoint again", "inspect", broken)
    refused(6, "not a lowra checkpoint", "inspect", dense)


def test_errors_as_json(lowra):
    failure = lowra.json("plan", "/no/such/folder", "--bits", 2, code=8)
    assert failure["kind"] == "ModelError"
    assert "/no/such/folder" in failure["error"]


def test_notes_and_traceback_only_when_asked(lowra, monkeypatch):
    def refuse(*_, **__):
        error = BudgetError("two\nlines")
        error.add_note("in pass: some-pass")
        raise error

    monkeypatch.setattr("lowra.workflows.skeletons.load_skeleton", refuse)
    assert lowra("plan", "m", "--bits", 2).stderr == "error: two lines\n"
    loud = lowra("plan", "m", "--bits", 2, "-v").stderr
    assert "in pass: some-pass" in loud
    assert "Traceback" in loud
    assert loud.endswith("error: two lines\n")


def test_a_bug_shows_its_traceback(lowra, monkeypatch):
    def fail(*_, **__):
        sys.stdout.write("noise on stdout")
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("lowra.workflows.skeletons.load_skeleton", fail)
    done = lowra("plan", "m", "--bits", 2)
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: oops" in done.stderr
    failure = lowra.json("plan", "m", "--bits", 2, code=1)
    assert failure == {"error": "ZeroDivisionError: oops", "kind": "ZeroDivisionError"}


def test_an_interrupted_compile_leaves_nothing_and_resumes(lowra, dense, tmp_path, monkeypatch):
    from lowra.passes import quantize_weights

    quantize, begun, allowed = quantize_weights.quantize, [], 5

    def interrupted(weight, *rest):
        if len(begun) == allowed:
            raise KeyboardInterrupt
        begun.append(weight.shape)
        return quantize(weight, *rest)

    monkeypatch.setattr(quantize_weights, "quantize", interrupted)
    out = tmp_path / "out"
    done = lowra("compile", dense, out, *QUICK)
    assert done.exit_code == 130, done.output
    assert done.stderr.endswith("interrupted; run the same command again to resume\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    allowed = 100
    data = lowra.json("compile", dense, out, *QUICK)
    assert len(begun) == data["totals"]["sites"]  # none was done twice
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert lowra("compile", dense, tmp_path / "at-once", *QUICK).exit_code == 0
    resumed, at_once = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "at-once")
    )
    assert resumed.keys() == at_once.keys()
    assert all(torch.equal(tensor, at_once[name]) for name, tensor in resumed.items())


def test_an_interrupted_plan_does_not_speak_of_resuming(lowra, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowra.workflows.skeletons.load_skeleton", interrupt)
    done = lowra("plan", "m", "--bits", 2)
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")
    assert lowra.json("plan", "m", "--bits", 2, code=130)["kind"] == "KeyboardInterrupt"


def test_files_of_others_in_the_work_folder_stay(lowra, dense, tmp_path):
    (tmp_path / "out.work").mkdir()
    mine = tmp_path / "out.work" / "mine.txt"
    mine.write_text("mine")
    assert lowra("compile", dense, tmp_path / "out", *QUICK).exit_code == 0
    assert list(mine.parent.iterdir()) == [mine]


def test_python_m_lowra():
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "lowra", *words],
            cwd=REPO, capture_output=True, text=True, check=False,
        )  # fmt: skip

    version = run("--version")
    assert (version.returncode, version.stdout) == (0, "lowra 0.1.0\n")
    missing = run("generate", "/no/such/folder", "Hi")
    assert missing.returncode == 8
    assert missing.stderr.count("\n") == 1
    assert missing.stderr.startswith("error: no model at '/no/such/folder'")
