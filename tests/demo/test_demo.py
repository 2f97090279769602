"""The demo from end to end on a tiny random model, and its measurements."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fisherkern import cli
from fisherkern.demo import comparisons, factors, main, measure
from fisherkern.demo.errors import DownloadError

TEXT = (
    "Nero was the last emperor of the dynasty.\nHe liked “music”, and the people of Rome did not. "
    * 6
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A GPT-2 of two narrow layers with random weights and one token per byte."""
    transformers = pytest.importorskip("transformers", reason="the demo needs transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="the demo needs transformers")
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    pytest.importorskip("tqdm", reason="the demo needs tqdm")
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(alphabet),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_demo_end_to_end(model_folder, tmp_path, capsys, monkeypatch):
    # a busy machine measures every layer too
    monkeypatch.setattr(factors, "BUDGET", 1e6)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    output = tmp_path / "out"
    files = ["--model", model_folder, "--text", tmp_path / "text.txt", "--output", output]
    status = cli.main(["demo", *map(str, files), "--tokens", "100", "--top", "3"])
    printed = capsys.readouterr().out
    assert status == 0
    assert "text.txt, 2 x 64 tokens" in printed  # the model reads no more than 64
    for comparison in comparisons.COMPARISONS:
        assert f"\n{comparison.name}" in printed
    assert "\nfloat32, 9 layers " in printed
    assert "\nbfloat16, 9 layers " in printed
    assert "128 tokens in 2 windows" in printed
    assert "\nfewest: " in printed
    assert "126 predictions: mean trace" in printed
    assert "Most uncertain: largest trace\n\n 1. trace" in printed
    assert "⟦" in printed
    assert (output / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_model_that_cannot_be_loaded_is_one_line(tmp_path, capsys):
    pytest.importorskip("transformers", reason="the demo needs transformers")
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    files = ["--model", tmp_path / "empty", "--text", tmp_path / "text.txt", "--output", tmp_path]
    status = cli.main(["demo", *map(str, files)])
    message = capsys.readouterr().err
    assert status == 1
    assert message.startswith("fisherkern demo: transformers cannot load")
    assert message.count("\n") == 1


@pytest.mark.parametrize("blocked", ["plot", "folder"])
def test_output_is_tried_before_anything_runs(blocked, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "out"
    if blocked == "plot":
        (folder / "trace.png").mkdir(parents=True)
    else:
        folder.write_text("")
    monkeypatch.setattr(main, "require_packages", lambda default_model: None)
    monkeypatch.setattr(main.text, "passages", None)
    assert cli.main(["demo", "--output", str(folder)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"fisherkern demo: --output {folder} cannot be ")
    assert message.count("\n") == 1


def test_output_that_can_be_written_is_left_as_it_was(tmp_path):
    assert list(main._output_folder(tmp_path / "new").iterdir()) == []
    (tmp_path / "trace.png").write_bytes(b"before")
    main._output_folder(tmp_path)
    assert (tmp_path / "trace.png").read_bytes() == b"before"


def test_missing_packages_say_how_to_install_them(monkeypatch, capsys):
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--model", "x"]) == 1
    assert capsys.readouterr().err == (
        "fisherkern demo: needs transformers, safetensors, matplotlib, tqdm: "
        "pip install 'fisherkern[demo]'\n"
    )


def test_failed_download_is_one_line(monkeypatch, capsys, tmp_path):
    def fail(_):
        raise DownloadError("pip could not download x. Run again.")

    monkeypatch.setattr(main, "require_packages", lambda default_model: None)
    monkeypatch.setattr(main.text.assets, "fetch", fail)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "fisherkern demo: pip could not download x. Run again.\n"


@pytest.mark.parametrize("comparison", comparisons.COMPARISONS, ids=lambda c: c.name)
def test_both_sides_compute_the_same_quantity(comparison):
    torch.manual_seed(0)
    z, v = torch.randn(24, 97) * 4, torch.randn(24, 97)
    for operation in (comparison.ours, comparison.plain):
        relative, largest = comparisons.errors(operation, comparison, z, v)
        assert relative < 1e-5
        assert largest < 1e-4


@pytest.mark.skipif(not measure.sees_resident_memory(), reason="needs Linux and its clear_refs")
def test_memory_counts_temporaries_and_results():
    size = 32 * 2**20

    def temporaries():
        x = torch.ones(size // 4)
        return (x * 2).sum()

    assert measure.peak_extra_bytes(temporaries) == pytest.approx(2 * size, rel=0.1)
    assert measure.peak_extra_bytes(lambda: torch.ones(size // 4)) == pytest.approx(size, rel=0.1)
    assert measure.peak_extra_bytes(lambda: None) < size // 10


def test_memory_of_the_allocator_counts_temporaries_and_results():
    size = 4 * 2**20

    def temporaries():
        x = torch.ones(size // 4)
        return (x * 2).sum()

    assert measure._allocator_peak(temporaries) == pytest.approx(2 * size, rel=0.01)


def test_median_alternates_and_stops_when_the_budget_is_spent():
    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert len(measure.median_seconds(calls, repeats=9, budget=0.0)) == 2
    assert "".join(order) == "ab" * 4  # a warm-up and three repeats
    measure.median_seconds(calls, budget=0.0, least=1, warm_up=False)
    assert "".join(order) == "ab" * 5


def test_command_line_imports_nothing_heavy():
    program = (
        "import sys, fisherkern.cli; fisherkern.cli.parser(); "
        "print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--windows", "0"],
        ["--tokens", "-3"],
        ["--tokens", "1"],
        ["--top", "many"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--seed", "99999999999999999999"],
    ],
)
def test_bad_numbers_are_refused(flags):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *flags])
    assert stop.value.code == 2


def test_bench_gets_its_own_options(monkeypatch):
    seen = []
    module = type(sys)("fisherkern.bench")
    module.main = seen.append
    monkeypatch.setitem(sys.modules, "fisherkern.bench", module)
    assert cli.main(["bench", "--help", "x"]) == 0
    assert seen == [["--help", "x"]]
