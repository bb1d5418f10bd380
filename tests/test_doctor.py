"""doctor.py tells what is there, what is missing and what to do, and reads no weights for it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import doctor
from minqlora import load_model
from minqlora.checkpoint import Quantization, quantized_size
from quantize import quantize_checkpoint


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, to change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run the script; return its page, each wrapped line as one."""
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "10000")
    doctor.main()
    return capsys.readouterr().out


def lines_of(folder: Path) -> dict[str, doctor.Line]:
    return {line.name: line for line in doctor.look_at_model(folder, torch.device("cpu"))}


def test_the_page_of_the_machine_names_versions_device_dtype_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page(monkeypatch, capsys, "--device", "cpu")
    for name in ("python", "torch", "device", "compute dtype", "torch.compile", "memory of cpu", "allocator"):
        assert any(name in line[:22] for line in text.splitlines()), name
    assert torch.__version__ in text and sys.version.split()[0] in text and "safetensors 0" in text
    assert "GB in all" in text and "GB free" in text


def test_lines_are_wrapped_under_their_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    doctor.show(doctor.Line("name", "word " * 30, False))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[ ] name") and all(len(line) <= 60 for line in lines)
    assert all(line.startswith(" " * 22 + "word") for line in lines[1:])


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True}, "bfloat16: this CPU multiplies it natively"),
        ({"avx2": True}, "float32: without AVX512-BF16 or AMX"),
    ],
)
def test_the_dtype_comes_with_its_reason(
    able: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert doctor.compute_dtype(torch.device("cpu")).startswith(expected)


def test_a_compiler_is_looked_for_where_the_device_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(doctor, "missing_compiler", lambda device: "no C++ compiler")
    assert "no C++ compiler; nothing here needs it" in doctor.compiler(torch.device("cpu")).text
    monkeypatch.setattr(doctor, "missing_compiler", lambda device: "no Triton")
    line = doctor.compiler(cuda)
    assert line.fine is False and line.text.startswith("no Triton: pip install triton; plain operations")
    monkeypatch.setattr(doctor, "missing_compiler", lambda device: None)
    for look_up, is_fine in (("tree", True), (None, False)):
        monkeypatch.setattr(doctor, "fastest_look_up", lambda device, look_up=look_up: look_up)
        assert doctor.compiler(cuda).fine is is_fine


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.13"}
    monkeypatch.setattr(doctor, "version", found.get)
    texts = [line.text for line in doctor.packages() if line.fine is False]
    assert len(texts) == 1 and texts[0].startswith("missing: pip install safetensors tokenizers")


def test_a_whole_model_has_a_tick_on_every_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(tiny_model)
    assert list(lines) == ["config", "weights", "size", "tokenizer", "chat template", "generation"]
    assert all(line.fine for line in lines.values())
    assert lines["config"].text.startswith("family llama: 2 layers of width 64, 4 heads of 16, 2 for keys")
    text = page(monkeypatch, capsys, tiny_model)
    assert page(monkeypatch, capsys, "--model_name_or_path", tiny_model) == text
    assert text.count("[x]") >= 6 and str(tiny_model) in text


def test_parameters_and_sizes_are_those_of_the_loaded_model(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    count = sum(parameter.numel() for parameter in model.parameters())
    quantized, held = quantized_size(model)
    lines = lines_of(tiny_model)
    assert lines["weights"].text.startswith(f"{count:,} parameters in 1 file")
    sizes = doctor.gb(2 * count), doctor.gb(held + 2 * (count - quantized))
    assert lines["size"].text.startswith(f"{sizes[0]} in 16 bits; {sizes[1]} in 4")


def test_a_folder_in_4_bits_is_told_as_such(tiny_model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_model, tmp_path / "nf4", Quantization())
    lines = lines_of(tmp_path / "nf4")
    assert "in 4 bits already" in lines["size"].text and all(line.fine for line in lines.values())


def test_a_model_that_does_not_fit_is_told(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda device: 1000)
    line = lines_of(tiny_model)["size"]
    assert line.fine is False and "cpu has 0.00 GB free: take a smaller model" in line.text


def test_no_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(doctor.Checkpoint, "read", read)
    monkeypatch.setattr(doctor.Checkpoint, "_read", read)
    assert lines_of(folder)["size"].fine


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What is done to the folder, the line that shows it, what that says, and whether the model can still be used.
DAMAGES: dict[str, tuple[Any, str, str, bool]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config", "config.json", False),
    "unknown": (lambda f: change_config(f, model_type="xlstm"), "config", "xlstm", False),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights", "holds neither", False),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 9),
        "weights",
        "model.safetensors",
        False,
    ),
    "other sizes": (
        lambda f: change_config(f, intermediate_size=8),
        "weights",
        "parameters in 1 file, but",
        False,
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer", "not found", False),
    "fewer tokens": (lambda f: change_config(f, vocab_size=9), "tokenizer", "config.json says 9", False),
    "broken": (lambda f: (f / "chat_template.jinja").write_text("{% if"), "chat template", "line 1", False),
    "no generation": (
        lambda f: (f / "generation_config.json").unlink(),
        "generation",
        "no generation_config.json; answers end at",
        True,
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_or_broken_is_named_and_the_rest_still_looked_at(
    folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, name, message, usable = DAMAGES[damage]
    spoil(folder)
    lines = lines_of(folder)
    assert message in lines[name].text and not lines[name].fine and lines[name].needed is not usable
    assert {"config", "weights", "tokenizer", "generation"} <= lines.keys()
    if not usable:
        with pytest.raises(SystemExit, match="1"):
            page(monkeypatch, capsys, folder)
        assert message in capsys.readouterr().out


def test_a_base_model_is_told_what_to_do_for_conversations(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    line = lines_of(folder)["chat template"]
    assert line.fine is None and "plain text" in line.text and "chat_template.jinja" in line.text


def test_a_folder_that_is_not_there_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        page(monkeypatch, capsys, "nowhere")
    assert capsys.readouterr().err == "error: no such model folder: nowhere\n"


def test_the_demos_model_is_whole(demo_model: Path) -> None:
    lines = lines_of(demo_model)
    assert all(line.fine for line in lines.values())
    assert lines["weights"].text.startswith("134,515,008 parameters")
