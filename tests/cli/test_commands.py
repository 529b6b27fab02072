"""Every command does its work, as text and as one JSON document."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from lowra.backends.activations import CHOICES, get_activations
from lowra.cli.advanced import ADVANCED
from lowra.cli.options import Activations, Dtype, Preset, Tune, Unit
from lowra.cli.output import Output
from lowra.cli.plan_tables import comparison_text
from lowra.cli.tables import bytes_text, group_alike
from lowra.recipe import Recipe
from lowra.recipe_checks import PRESETS, TUNES, UNITS
from lowra.runtime.checkpoint_reader import DTYPES
from tests.cli.conftest import QUICK


def test_options_name_what_the_library_knows():
    assert [preset.value for preset in Preset] == list(PRESETS)
    assert [unit.value for unit in Unit] == list(UNITS)
    assert [tune.value for tune in Tune] == list(TUNES)
    assert {dtype.value for dtype in Dtype} == set(DTYPES)


def test_plan_groups_equal_layers_and_says_what_is_skipped(lowra, dense, no_graph):
    done = lowra("plan", dense, "--bits", 3)
    assert done.exit_code == 0, done.output
    assert "model.layers.*.self_attn.q_proj x 2" in done.stdout
    assert re.search(r"reachable +1\.\d+ to \d\.\d+ stored bits per weight", done.stdout)
    assert "output head" in done.stdout
    assert "\x1b" not in done.output


def test_plan_as_json(lowra, dense, no_graph):
    data = lowra.json(
        "plan", dense, "--bits", "5", "--widths", "1.6,2,4", "--unit", "layer", "--rank", "4",
        "--pin", "*.q_proj=4", "--pin", "re:[ku]p?_proj=2", "--ignore", "*.o_proj",
        "--include", "lm_head", "--count-adapters", "--dtype", "float32",
    )  # fmt: skip
    recipe = data["recipe"]
    assert recipe["pins"] == {"*.q_proj": 4, "re:[ku]p?_proj": 2}
    assert (recipe["widths"], recipe["unit"], recipe["rank"]) == ([1.6, 2, 4], "layer", 4)
    assert recipe["count_adapters"]
    assert data["dense_bytes"] == 4 * data["weights"]
    assert "lm_head" in {site["name"] for site in data["sites"]}
    reasons = {row["name"]: row["reason"] for row in data["skipped"]}
    assert reasons["model.layers.0.self_attn.o_proj.weight"] == "ignored by the recipe"


def test_advanced_options_are_the_recipes_fields_in_a_panel_of_their_own(lowra, dense, no_graph):
    recipe = lowra.json(
        "plan", dense, "--bits", 5, "--group", 32, "--scale-bits", 4, "--codebook-bits", 8,
        "--own-codebooks", "--plain-codes", "--no-rotation", "--guided", 1, "--init", "zero",
    )["recipe"]  # fmt: skip
    assert (recipe["group"], recipe["scale_bits"], recipe["codebook_bits"]) == (32, 4, 8)
    assert recipe["shared_codebooks"] is False and recipe["rotation"] is False
    assert recipe["trellis"] is False
    assert (recipe["guided"], recipe["init"]) == (1, "zero")
    recipe = lowra.json(
        "plan", dense, "--bits", 5, "--layouts", "row8-shared16, 32x4-own8", "--rotation",
        "--correction-rank", 2, "--correction-bits", 8,
    )["recipe"]  # fmt: skip
    assert recipe["layouts"] == ["row8-shared16", "32x4-own8"] and recipe["rotation"] is True
    assert (recipe["correction_rank"], recipe["correction_bits"]) == (2, 8)
    assert {field.name for field in dataclasses.fields(Recipe)} >= set(ADVANCED)
    help_text = lowra("plan", "--help").stdout
    assert "Advanced" in help_text


def test_compile_chooses_layouts(lowra, dense, tmp_path):
    data = lowra.json("compile", dense, tmp_path / "o", *QUICK, "--layouts", "auto", "--rank", 0)
    assert data["recipe"]["layouts"] == "auto"
    assert data["totals"]["stored_bits"] <= 3
    assert sum(data["totals"]["layouts"].values()) == len(data["sites"])
    assert "choose-layouts" in data["pipeline"]


def test_compile_as_json(compiled):
    out, data = compiled
    assert data["path"] == str(out)
    assert data["totals"]["stored_bits"] <= 3
    assert sum(data["totals"]["rows"].values()) == sum(site["shape"][0] for site in data["sites"])
    assert data["seconds"]["quantize-weights"] >= 0
    assert (out / "lowra.json").is_file()
    assert (out / "tokenizer.json").is_file()
    assert not out.with_name("compiled.work").exists()


def test_compile_prints_totals_and_keeps_a_work_folder_that_was_chosen(
    lowra, dense, tmp_path, no_graph
):
    text, work = tmp_path / "text.txt", tmp_path / "work"
    text.write_text("A text to calibrate with. " * 20, encoding="utf-8")
    words = ("compile", dense, tmp_path / "out", *QUICK, "--calibration", text, "--work-dir", work)
    done = lowra(*words)
    assert done.exit_code == 0, done.output
    for word in ("stored bits", "code bits", " bytes)", "at 2 bit", "quantize-weights", "128 tok"):
        assert word in done.stdout
    assert str(work) in done.stderr
    assert any(work.iterdir())
    again = lowra(*words, "--overwrite")
    assert again.exit_code == 0, again.output
    assert "used again" in again.stderr


def test_compile_with_tuning(lowra, dense, tmp_path):
    data = lowra.json("compile", dense, tmp_path / "o", *QUICK, "--tune", "blocks",
                      "--tune-steps", 2)  # fmt: skip
    assert (data["recipe"]["tune"], data["recipe"]["tune_steps"]) == ("blocks", 2)
    assert [block["name"] for block in data["tuning"]["blocks"]] == [
        "model.layers.0", "model.layers.1",
    ]  # fmt: skip
    assert data["seconds"]["tune-blocks"] > 0


def test_tuning_without_a_graph_is_refused(lowra, dense, tmp_path, no_graph):
    done = lowra("compile", dense, tmp_path / "o", *QUICK, "--tune", "full")
    assert done.exit_code != 0
    assert "tuning needs the traced graph" in done.stderr


def test_compile_to_the_paper_without_data(lowra, dense, tmp_path, no_graph):
    data = lowra.json("compile", dense, tmp_path / "o", "--bits", 2, "--preset", "lowra")
    assert data["recipe"]["preset"] == "lowra"
    assert data["calibration_tokens"] == 0


def test_inspect_shows_sites_and_totals(lowra, checkpoint):
    done = lowra("inspect", checkpoint)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("_proj") == 14
    assert "stored bits" in done.stdout
    assert "embedding, kept in 16 bit" in done.stdout


def test_inspect_as_json_with_a_pattern(lowra, compiled):
    out, report = compiled
    data = lowra.json("inspect", out, "--site", "*.1.mlp.*")
    assert [site["name"] for site in data["sites"]] == [
        f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")
    ]
    assert data["totals"] == report["totals"]


def test_inspect_prints_the_graph(lowra, checkpoint):
    done = lowra("inspect", checkpoint, "--graph")
    assert done.exit_code == 0, done.output
    assert "lowra.quantized_linear" in done.stdout
    assert "sites 14, weights 61440" in done.stdout


def test_inspect_prints_gpu_kernels(lowra, compiled, checkpoint):
    data = lowra.json("inspect", checkpoint, "--kernels", "--target", "sm80", "--tokens", "64")
    sites = [site for kernel in data["kernels"] for site in kernel["sites"]]
    assert len(sites) == len(set(sites)) == len(lowra.json("inspect", checkpoint)["sites"])
    assert not data["declined"]
    for kernel in data["kernels"]:
        assert kernel["name"].startswith("linear-sm80-") and "@triton.jit" in kernel["source"]
    assert "# sites: " in lowra("inspect", checkpoint, "--kernels").stdout


def test_inspect_explains_capture(lowra, dense, monkeypatch):
    assert "torch.export traces LlamaFor" in lowra("inspect", dense, "--explain-capture").stdout

    def refuse(*_):
        raise RuntimeError("data-dependent branch\nin forward")

    monkeypatch.setattr("lowra.compiler.capture._export", refuse)
    done = lowra("inspect", dense, "--explain-capture")
    assert done.exit_code == 0, done.output
    assert "does not trace LlamaForCausalLM: torch.export failed with RuntimeErr" in done.stdout
    assert "data-dependent branch" in done.stdout
    assert "no Session" in done.stdout
    assert not lowra.json("inspect", dense, "--explain-capture")["capture"]["works"]


def test_eval_with_and_without_adapters(lowra, dense, checkpoint):
    words = ("eval", checkpoint, "--reference", dense, "--windows", 2, "--context", 32)
    words = (*words, "--dtype", "float32")
    full, bare = lowra.json(*words), lowra.json(*words, "--no-adapters")
    assert (full["windows"], full["context"], full["tokens"]) == (2, 32, 62)
    assert 0 < full["kl"] < bare["kl"]
    assert lowra.json("eval", checkpoint, "--windows", 1, "--context", 32)["kl"] is None


def test_activations_are_read_as_asked_for_one_command(lowra, checkpoint):
    words = ("eval", checkpoint, "--windows", 2, "--context", 32)
    before = get_activations()
    plain, eight = lowra.json(*words), lowra.json(*words, "--activations", "int8")
    assert (plain["activations"], eight["activations"]) == (None, "int8")
    assert eight["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)
    assert get_activations() == before
    assert lowra("eval", checkpoint, "--activations", "int4").exit_code == 2
    assert [kind.value for kind in Activations] == list(CHOICES)


def test_eval_names_windows_context_and_text(lowra, dense, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("words and more words " * 20, encoding="utf-8")
    words = ("eval", dense, "--reference", dense, "--text", text, "--windows", 3, "--context", 16)
    done = lowra(*words)
    assert done.exit_code == 0, done.output
    assert "3 of 16 tokens, 45 scored" in done.stdout
    assert str(text) in done.stdout
    assert "mean KL     0.00000" in done.stdout


def test_generate(lowra, checkpoint):
    done = lowra("generate", checkpoint, "Hi", "--tokens", 3)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Hi")
    drawn = [
        lowra.json("generate", checkpoint, "Hi", "--tokens", 8, "--sample", "--seed", seed)["text"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_may_look_like_an_option(lowra, checkpoint):
    done = lowra("generate", checkpoint, "--tokens", 2, "--", "--json")
    assert done.stdout.startswith("--json")


def test_export_writes_an_archive_that_runs(lowra, checkpoint, tmp_path):
    out = tmp_path / "model.pt2"
    out.touch()
    assert lowra("export", checkpoint, out).exit_code == 7
    data = lowra.json("export", checkpoint, out, "--overwrite")
    assert data["bytes"] == out.stat().st_size
    ids = torch.arange(8).view(2, 4)
    logits = torch.export.load(out).module()(ids, torch.ones_like(ids))
    assert logits.shape == (2, 4, 128)


@pytest.mark.parametrize("name", ["plan", "compile", "eval", "inspect", "generate", "export"])
def test_every_command_has_help(lowra, name):
    done = lowra(name, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout


def test_json_has_no_infinity(capsys):
    Output(as_json=True, verbose=False).show(
        {"perplexity": float("inf"), "rows": [float("nan")]}, print
    )
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "rows": [None]}


def test_rows_that_differ_in_layer_numbers_only_are_one():
    rows = [{"name": f"h.{i}.fc{i}", "shape": [4, 4 + i // 2]} for i in (0, 0, 1, 2)]
    assert [(name, count) for name, _, count in group_alike(rows, "shape")] == [
        ("h.*.fc0 x 2", 2),
        ("h.1.fc1", 1),
        ("h.2.fc2", 1),
    ]


def test_the_comparison_with_one_width_in_words():
    assert comparison_text(None) == "not compared"
    kept = [
        comparison_text({"width": 1.6, "mixed": mixed, "uniform": 0.5}).partition(": ")[2]
        for mixed in (0.25, 0.5, 0.75)
    ]
    assert kept == ["kept the mixed plan"] * 2 + ["kept one width for all rows"]


def test_bytes_in_words():
    assert [bytes_text(n) for n in (12, 1234, 5_600_000)] == ["12 bytes", "1.2 kB", "5.6 MB"]


def test_plan_reads_no_weights(lowra, dense, tmp_path):
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes((dense / "config.json").read_bytes())
    done = lowra("plan", folder, "--bits", 3, "--out", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    for word in ("estimated error", "peak memory", "quantize-weights", "checkpoint", "Gaussian"):
        assert word in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == "lowra-plan"


def test_compile_replays_a_plan(lowra, dense, tmp_path, no_graph):
    plan, first, second = tmp_path / "plan.json", tmp_path / "first", tmp_path / "second"
    words = (*QUICK, "--seed", 1, "--save-plan", plan)
    data = lowra.json("compile", dense, first, *words)
    assert data["plan"] == str(plan) and data["assignment"]["gap"] < 1e-4
    again = lowra.json("compile", dense, second, "--plan", plan, "--dtype", "float32")
    assert again["recipe"] == data["recipe"] and again["recipe"]["seed"] == 1
    for name in ("model.safetensors", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    shown = lowra("inspect", first)
    assert "assignment" in shown.stdout and "saved by one more bit" in shown.stdout
    for option, value in (("--bits", 2), ("--rank", 4), ("--seed", 0), ("--pin", "*=4")):
        clash = lowra("compile", dense, tmp_path / "x", "--plan", plan, option, value)
        assert clash.exit_code == 2 and option in clash.stderr
    other = lowra("compile", dense, tmp_path / "x", "--plan", plan)  # bfloat16, other bytes
    assert other.exit_code == 2 and "weights do not" in other.stderr
    assert "--bits" in lowra("compile", dense, tmp_path / "x").stderr
    assert lowra("compile", dense, tmp_path / "x", *words).exit_code == 7


def test_a_measured_plan_is_replayed_to_the_bytes_of_a_compile(lowra, dense, compiled, tmp_path):
    plan, work = tmp_path / "plan.json", tmp_path / "work"
    data = lowra.json("plan", dense, *QUICK, "--measure", "--out", plan, "--work-dir", work)
    assert data["written"] == str(plan)
    assert data["assignment"] == compiled[1]["assignment"]
    assert data["measured"]["seconds"]["assign-precision"] >= 0
    assert any(work.iterdir())
    again = tmp_path / "again"
    lowra.json("compile", dense, again, "--plan", plan, "--dtype", "float32", "--work-dir", work)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (compiled[0] / name).read_bytes()


def test_a_measured_plan_in_words(lowra, dense, tmp_path, no_graph):
    text = tmp_path / "text.txt"
    text.write_text("A text to plan with. " * 20, encoding="utf-8")
    done = lowra("plan", dense, *QUICK, "--measure", "--calibration", text, "--seed", 1)
    assert done.exit_code == 0, done.output
    for word in ("expected loss", "saved by one more bit", "measured", "against one width",
                 "model.layers.1.mlp.down_proj", "128 tok", "quantize-weights"):  # fmt: skip
        assert word in done.stdout
    assert "Gaussian" not in done.stdout
    for option, value in (("--calibration", text), ("--work-dir", tmp_path / "work")):
        clash = lowra("plan", dense, *QUICK, option, value)
        assert clash.exit_code == 2 and option in clash.stderr and "--measure" in clash.stderr
    (tmp_path / "plan.json").write_text("mine")
    kept = lowra("plan", dense, *QUICK, "--measure", "--out", tmp_path / "plan.json")
    assert kept.exit_code == 7 and (tmp_path / "plan.json").read_text() == "mine"
